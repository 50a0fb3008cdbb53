"""What lanes remember of the past: prefill of live requests, last window, exponential averages."""

from __future__ import annotations

from collections import OrderedDict
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from ndp_gym.outcome import Outcome
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace

LAYER_NAMES = ("gpu_s", "far_s", "link_s", "stall_s", "hit_share")
"""Columns of ``layer``: seconds per decode step of the last window, and its share of hits."""
EMA_WEIGHT = 0.3
"""Weight of the last window in the exponential averages."""
_CACHED_BYTES = 256 * 2**20


class Memory:
    """Past loads, energies and times of N lanes with B slots; ``shape`` is (L, E).

    Attributes:
        prefill_load: [N, L, E] tokens per decode step that the prompts of the live requests
            promise.
        loads: [3, N, L, E] tokens per decode step in the last window, the same averaged over
            windows, and averaged gate energy.
        layer: [N, L, 5], see `LAYER_NAMES`.
        fetch_bytes: [N] copied on demand per decode step of the last window.
        has_history: [N] whether a window has been seen.
        n_admitted: [N] requests admitted since the last window.
    """

    def __init__(self, n_lanes: int, batch_size: int, shape: tuple[int, int]) -> None:
        """Nothing remembered."""
        self._slot_load = np.zeros((n_lanes, batch_size, *shape), np.float32)
        self.prefill_load = np.zeros((n_lanes, *shape), np.float32)
        self.loads = np.zeros((3, n_lanes, *shape), np.float64)
        self.layer = np.zeros((n_lanes, shape[0], len(LAYER_NAMES)), np.float32)
        self.fetch_bytes = np.zeros(n_lanes, np.float64)
        self.has_history = np.zeros(n_lanes, np.bool_)
        self.n_admitted = np.zeros(n_lanes, np.int64)
        self._weight = np.ones(n_lanes)
        self._loops = import_module("ndp_gym.lane_loops")  # numba comes with it

    def forget(self, lane: int) -> None:
        """Start one lane's episode afresh."""
        self.loads[:, lane] = 0
        self.layer[lane] = 0
        self.fetch_bytes[lane] = 0
        self.has_history[lane] = False
        self.n_admitted[lane] = 0
        self._weight[lane] = 1.0

    @property
    def last_load(self) -> NDArray[np.float64]:
        """[N, L, E] tokens per decode step in the last window."""
        last: NDArray[np.float64] = self.loads[0]
        return last

    def remember(self, outcome: Outcome) -> None:
        """Fold the last window into the averages; the first one replaces them."""
        o = outcome
        seconds = o.gpu_s, o.far_s, o.link_s, o.stall_s
        self._loops.remember(
            self._weight, o.step_tokens, o.counts, o.gate_energy, seconds, o.layer_hits,
            o.layer_routed, o.fetch_bytes, self.loads, self.layer, self.fetch_bytes,
        )  # fmt: skip
        self._weight.fill(EMA_WEIGHT)
        self.has_history.fill(True)
        self.n_admitted.fill(0)

    def admit(
        self, lane: int, slot: int, load: NDArray[np.float32], energy: NDArray[np.float64]
    ) -> None:
        """Note what a request's prompt [L, E] said, per prompt token; `settle` adds it up.

        Prompts stand in for the gate energy of decode windows until there is one.
        """
        self._slot_load[lane, slot] = load
        self.n_admitted[lane] += 1
        if not self.has_history[lane]:
            self.loads[2, lane] += energy

    def settle(self, lane: int, request: NDArray[np.int64]) -> None:
        """Add up the prompts of one lane's slots [B] that hold a request, after they changed."""
        self._loops.add_prompts(self._slot_load[lane], request, self.prefill_load[lane])


class PromptCounts:
    """Tokens and squared-gate energy per prompt token of requests, [L, E] each.

    Results are kept, the least recently used dropped beyond 256 MiB.
    """

    def __init__(self, trace: RoutingTrace, profile: NDArray[np.float64]) -> None:
        """Nothing counted; ``profile`` [K] stands for gate weights that were not recorded."""
        self._trace, self._profile = trace, profile
        self._known: OrderedDict[int, tuple[NDArray[np.float32], NDArray[np.float64]]]
        self._known = OrderedDict()
        entry_bytes = 12 * trace.n_layers * trace.n_experts
        self._capacity = max(1, _CACHED_BYTES // entry_bytes)

    def __call__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Load and energy of the request ``index``, whose rows are checked the first time.

        Raises:
            ValueError: the recording is damaged there.
        """
        if index in self._known:
            self._known.move_to_end(index)
            return self._known[index]
        requests = self._trace.requests
        self._trace.check_rows(
            requests.start[index : index + 1], requests.length[index : index + 1]
        )
        start, n_prompt = int(requests.start[index]), int(requests.n_prompt[index])
        load, energy = prefill_counts(self._trace, start, n_prompt, self._profile)
        if len(self._known) >= self._capacity:
            self._known.popitem(last=False)
        self._known[index] = load.astype(np.float32), energy
        return self._known[index]


def prefill_counts(
    trace: RoutingTrace, start: int, n_prompt: int, profile: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and squared-gate energy per prompt token, [L, E] each; 0 without a prompt."""
    shape = (trace.n_layers, trace.n_experts)
    if n_prompt == 0:
        return np.zeros(shape), np.zeros(shape)
    ids = trace.expert_ids[start : start + n_prompt].astype(np.int64)
    codes = (ids + np.arange(trace.n_layers)[:, None] * trace.n_experts).ravel()
    if trace.gate_weights is None:
        gates = np.broadcast_to(profile, ids.shape)
    else:
        gates = trace.gate_weights[start : start + n_prompt].astype(np.float64)
    n = shape[0] * shape[1]
    load = np.bincount(codes, minlength=n).reshape(shape) / n_prompt
    energy = (
        np.bincount(codes, weights=np.square(gates).ravel(), minlength=n).reshape(shape) / n_prompt
    )
    return load, energy


def gate_profile(trace: RoutingTrace, model: MoESpec) -> tuple[NDArray[np.float64], str]:
    """Gate weight [K] assumed by router rank where none were recorded, and its name.

    Recorded weights win. Without them the model's mean weight by rank stands in where ids are in
    router rank and the preset has one; else 1 / K.
    """
    uniform = np.full(trace.top_k, 1.0 / trace.top_k)
    if trace.gate_weights is not None:
        return uniform, "recorded"
    if trace.metadata.id_order == "router_rank" and model.gate_profile is not None:
        profile = np.asarray(model.gate_profile, np.float64)
        return profile / profile.sum(), f"rank profile of {model.name}"
    return uniform, "uniform 1/K"
