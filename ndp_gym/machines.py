"""Which machine runs each lane in the coming window, with how much HBM, and what is told of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ndp_gym.budget import auto_budgets_bytes, fixed_budget_bytes
from ndp_gym.condition import Condition
from ndp_gym.policy import CONTEXT_NAMES
from ndp_gym.specs import MoESpec, SystemSpec

_NEVER = np.iinfo(np.int64).max


class Machines:
    """The conditions of N lanes, window by window.

    Attributes:
        base: what lanes run under by default.
        conditions: [N] what each runs under.
        actual: [N] the system that runs the coming window.
        quality_weights: [N] 1 / nat.
        n_windows: [N] windows since the reset.
        budgets: [N] HBM bytes for experts in the coming window.
        facts: [N, 16] what is told, in the order of `CONTEXT_NAMES`; 0 where it is no fact of the
            machine.
    """

    def __init__(self, model: MoESpec, base: Condition, n_lanes: int, window: int) -> None:
        """All lanes under ``base``; every one then waits for `reset`."""
        self._model, self._window, self.base = model, window, base
        self.conditions = [base] * n_lanes
        self.actual: list[SystemSpec] = [base.actual_at(0)] * n_lanes
        self.quality_weights = np.full(n_lanes, base.quality_weight, np.float64)
        self.n_windows = np.zeros(n_lanes, np.int64)
        self.budgets = np.zeros(n_lanes, np.int64)
        self.facts = np.tile(self._told(base), (n_lanes, 1))
        self._whole_budgets = np.zeros(n_lanes, np.int64)
        self._budget_factors = np.ones(n_lanes)
        self._is_auto = np.zeros(n_lanes, np.bool_)
        self._has_auto = False
        self._next_change = np.full(n_lanes, _NEVER)

    def reset(self, lane: int, condition: Condition) -> None:
        """Put one lane at the start of an episode; `settle_budgets` comes once it has requests."""
        self.conditions[lane] = condition
        self.actual[lane] = condition.actual_at(0)
        self.quality_weights[lane] = condition.quality_weight
        self.n_windows[lane] = 0
        self.facts[lane] = self._told(condition)
        fixed = fixed_budget_bytes(condition.hbm_budget, self._model)
        self._is_auto[lane] = fixed is None
        self._has_auto = bool(self._is_auto.any())
        self._whole_budgets[lane] = fixed or 0
        self._budget_factors[lane] = condition.budget_factor_at(0)
        self._await_change(lane)

    def advance(self) -> list[int]:
        """One window later -> lanes that another machine runs, or with another share of HBM."""
        self.n_windows += 1
        changed: list[int] = np.flatnonzero(self._next_change <= self.n_windows).tolist()
        for lane in changed:
            condition, window = self.conditions[lane], int(self.n_windows[lane])
            self.actual[lane] = condition.actual_at(window)
            self._budget_factors[lane] = condition.budget_factor_at(window)
            self._await_change(lane)
        return changed

    def settle_budgets(self, contexts: NDArray[np.int64], *, changed: bool) -> None:
        """Budgets for the live contexts [N, B] of now, where they depend on these or ``changed``.

        What the observation says of them is rounded toward zero.
        """
        if self._has_auto:
            system = self.base.system
            auto = auto_budgets_bytes(self._model, system, contexts, self._window)
            self._whole_budgets[self._is_auto] = auto[self._is_auto]
        elif not changed:
            return
        self.budgets[:] = self._whole_budgets * self._budget_factors
        self.facts[:, 0] = toward_zero(self.budgets)
        self.facts[:, 1] = self.budgets / self._model.routed_bytes16

    def _await_change(self, lane: int) -> None:
        """Note the next window whose machine or budget is another."""
        now = self.n_windows[lane]
        later = (window for window in self.conditions[lane].changes if window > now)
        self._next_change[lane] = next(later, _NEVER)

    def _told(self, condition: Condition) -> NDArray[np.float32]:
        gpu, far, link = condition.system.gpu, condition.system.far, condition.system.link
        facts = dict.fromkeys(CONTEXT_NAMES, 0.0)
        facts |= {
            "batch_size": condition.batch_size,
            "window": self._window,
            "gpu_bytes_per_s": gpu.bandwidth_bytes_per_s,
            "gpu_flops_per_s": gpu.flops_per_s,
            "far_bytes_per_s": far.bandwidth_bytes_per_s * far.efficiency,
            "far_flops_per_s": far.flops_per_s,
            "link_bytes_per_s": link.bandwidth_bytes_per_s,
            "link_latency_s": link.latency_s,
            "quality_weight": condition.quality_weight,
        }
        return np.array(list(facts.values()), np.float32)


def toward_zero(values: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 of non-negative integers, never larger than they are."""
    rounded = values.astype(np.float32)
    too_large = rounded.astype(np.float64) > values
    if not too_large.any():
        return rounded
    return np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded)
