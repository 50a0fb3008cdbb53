"""What the machine really takes, learnt from measured seconds: one factor per device and lane.

After every window the seconds that an observation reports for GPU, far device and link are compared
with what nominal costs say for the routing and the copies of that window. The logarithm of the
ratio is integrated, per device: the balance of both sides alone would do for placing experts, but
seconds are also weighed against quality.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.lanes import Observations
from ndp_gym.layer_facts import LaneFacts
from ndp_gym.layer_forecast import entry
from ndp_gym.plan import FAR, HBM
from ndp_gym.rules import check_number

__all__ = ["GAIN", "LaneSpeeds", "costs_of", "scaled"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FACTOR_RANGE = (0.125, 8.0)
"""Seconds over nominal seconds that are believed; what lies outside counts as the end (assumed)."""

GAIN = 0.3
"""Share of the remaining error that a window corrects (assumed)."""


class LaneSpeeds:
    """Factors of N lanes; call `learn` once per window, after `expect` has noted the plan.

    Args:
        n_lanes: lanes N.
        top_k: experts per token.
        gain: share of the remaining error that a window corrects, 0 for none.

    Attributes:
        factors: [N, 3] actual over nominal seconds of GPU, far device and link, as far as learnt.
    """

    def __init__(self, n_lanes: int, top_k: int, gain: float = GAIN) -> None:
        """Trust the nominal costs.

        Raises:
            ValueError: ``gain`` is not in 0..1.
        """
        check_number("gain", "in 0..1", gain)
        self.gain, self._top_k = gain, top_k
        self.factors = np.ones((n_lanes, 3))
        self._before: tuple[IntArray, IntArray] | None = None
        self._known = np.zeros(n_lanes, np.bool_)
        self._loops = import_module("ndp_gym.speed_loops")  # numba comes with it

    def reset(self, lane: int) -> None:
        """Trust the nominal costs of one lane again."""
        self.factors[lane] = 1.0
        self._known[lane] = False

    def expect(
        self, observations: Observations, tier: NDArray[np.uint8], bits: NDArray[np.uint8]
    ) -> None:
        """Note where experts start the coming window: seen in [N, L, E], planned in the others."""
        hbm, now = _where(observations)
        is_far, planned = tier == FAR, bits.astype(np.int64)
        loaded = hbm.any(axis=(1, 2), keepdims=True)  # else a first plan loads before the window
        start = np.where(loaded, np.where(is_far, 0, hbm), np.where(is_far, 0, planned))
        self._before = start, np.where(is_far, planned, now)
        self._known[:] = True

    def learn(self, observations: Observations, facts: LaneFacts) -> None:
        """Correct the factors by the window that has just passed; ``facts`` are nominal."""
        if self._before is None or self.gain == 0 or not self._known.any():
            return
        load = observations["last_load"].astype(np.float64)
        one_s = facts.copy_s[:, 0] / facts.shared.table.weight_bytes[0]  # per byte
        fetched_s = entry(observations["context"], "fetch_bytes") * one_s
        nominal = np.zeros((len(load), 5))
        self._loops.nominal_seconds(
            load, (self._before, _where(observations)), costs_of(facts), float(self._top_k),
            float(facts.shared.table.far_min_tokens), facts.shared.far_computes, fetched_s, nominal,
        )  # fmt: skip
        nominal *= 0.5  # half-way between the window's start and end
        measured = observations["layer"].astype(np.float64).sum(axis=1)[:, :3]
        constant = nominal[:, [3, 3, 4]] * (1.0, 0.0, 1.0)  # launches and latency keep their speed
        scales = nominal[:, :3]
        usable = self._known[:, None] & (scales > 0) & (measured > constant)
        seen = np.where(usable, measured - constant, 1.0) / np.where(usable, scales, 1.0)
        error = np.log(seen.clip(*FACTOR_RANGE)) - np.log(self.factors)
        self.factors = self.factors * np.exp(self.gain * usable * error)


def scaled(table: CostTable, factors: FloatArray) -> CostTable:
    """The costs of a machine whose GPU, far device and link take ``factors`` [3] times as long."""
    gpu, far, link = factors
    return table._replace(
        gpu_weight_s=gpu * table.gpu_weight_s,
        gpu_token_s=gpu * table.gpu_token_s,
        layer_s=gpu * table.layer_s,
        kv_token_s=gpu * table.kv_token_s,
        dense_layer_s=gpu * table.dense_layer_s,
        head_s=gpu * table.head_s,
        far_weight_s=far * table.far_weight_s,
        far_token_s=far * table.far_token_s,
        copy_s=link * table.copy_s,
        activation_token_s=link * table.activation_token_s,
        link_bytes_per_s=table.link_bytes_per_s / link,
    )


def _where(observations: Observations) -> tuple[IntArray, IntArray]:
    """[N, L, E] widths in HBM, 0 = far, and widths wherever they are."""
    bits = observations["bitwidth"].astype(np.int64)
    return np.where(observations["tier"] == HBM, bits, 0), np.ascontiguousarray(bits)


def costs_of(facts: LaneFacts) -> tuple[NDArray[np.generic], ...]:
    """Nominal costs as `ndp_gym.speed_loops.nominal_seconds` reads them."""
    return (
        facts.shared.table.index_of, facts.gpu_weight_s, facts.gpu_launch_s, facts.far_weight_s,
        facts.copy_s, facts.far_token_s, facts.gpu_token_s, facts.link_latency_s,
        facts.activation_token_s,
    )  # fmt: skip
