"""What lanes remember of the past: prefill of live requests, last window, exponential averages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ndp_gym.outcome import Outcome
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace

LAYER_NAMES = ("gpu_s", "far_s", "link_s", "stall_s", "hit_share")
"""Columns of ``layer``: seconds per decode step of the last window, and its share of hits."""
EMA_WEIGHT = 0.3
"""Weight of the last window in the exponential averages."""


class Memory:
    """Past loads, energies and times of N lanes with B slots; ``shape`` is (L, E).

    Attributes:
        slot_load: [N, B, L, E] tokens per prompt token of each live request.
        slot_energy: [N, B, L, E] squared-gate energy per prompt token.
        last_load, ema_load: [N, L, E] tokens per decode step in the last window, and averaged
            over windows.
        layer: [N, L, 5], see `LAYER_NAMES`.
        has_history: [N] whether a window has been seen.
        n_admitted: [N] requests admitted since the last window.
    """

    def __init__(self, n_lanes: int, batch_size: int, shape: tuple[int, int]) -> None:
        """Nothing remembered."""
        self.slot_load = np.zeros((n_lanes, batch_size, *shape), np.float32)
        self.slot_energy = np.zeros((n_lanes, batch_size, *shape), np.float32)
        self.last_load = np.zeros((n_lanes, *shape), np.float64)
        self.ema_load = np.zeros((n_lanes, *shape), np.float64)
        self._ema_energy = np.zeros((n_lanes, *shape), np.float64)
        self.layer = np.zeros((n_lanes, shape[0], len(LAYER_NAMES)), np.float32)
        self.has_history = np.zeros(n_lanes, np.bool_)
        self.n_admitted = np.zeros(n_lanes, np.int64)

    def forget(self, lane: int) -> None:
        """Start one lane's episode afresh."""
        for array in vars(self).values():
            array[lane] = 0

    def remember(self, outcome: Outcome) -> None:
        """Fold the last window into the averages; the first one replaces them."""
        steps = np.maximum((outcome.step_tokens > 0).sum(axis=1), 1)
        self.last_load = outcome.counts / steps[:, None, None]
        weight = np.where(self.has_history, EMA_WEIGHT, 1.0)[:, None, None]
        self.ema_load += weight * (self.last_load - self.ema_load)
        self._ema_energy += weight * (outcome.gate_energy / steps[:, None, None] - self._ema_energy)
        for column, name in enumerate(LAYER_NAMES[:-1]):
            self.layer[:, :, column] = getattr(outcome, name) / steps[:, None]
        self.layer[:, :, -1] = outcome.layer_hits / np.maximum(outcome.layer_routed, 1)
        self.has_history[:] = True

    def prefill_load(self, live: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[N, L, E] tokens per decode step expected from the prompts of the live requests."""
        total = np.einsum("nb,nble->nle", live, self.slot_load)
        return np.asarray(total, np.float32)

    def gate_share(self, live: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[N, L, E] share of each layer's gate energy: averaged windows, or prompts at first."""
        prefill = np.einsum("nb,nble->nle", live, self.slot_energy)
        energy = np.where(self.has_history[:, None, None], self._ema_energy, prefill)
        total = energy.sum(axis=2, keepdims=True)
        share = np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
        return share.astype(np.float32)


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
