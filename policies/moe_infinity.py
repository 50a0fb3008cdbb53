"""MoE-Infinity: past requests that used the same experts tell which to keep and which to fetch."""

from collections import deque
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import uniform_distinct
from ndp_gym.forecast import shares
from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry
from ndp_gym.predictor import prefetch_at
from ndp_gym.specs import Service

FloatArray = NDArray[np.float64]


@dataclass(eq=False)
class MoeInfinity:
    """Request-level activation matrices [L, E] of arXiv 2401.14361, matched by cosine.

    The best match predicts the window; an expert of layer i has priority ``P * (1 - i / L)`` for
    HBM, as what comes late can be fetched in time. The prefetch's accuracy is measured: the share
    of the last window's tokens that the prediction made for it would have fetched. **mechanism**:
    the published times (155 ms per token) are of a machine that is not among the presets.
    Approximated: the matrix is that of all live requests of a window, what HBM keeps is renewed per
    window and not per layer, and priorities see all layers from the first.

    Attributes:
        bits: width of the experts (paper: 16; 4 here, as for the other caches).
        n_kept: past matrices (paper: 120 to 1000).
        blend: weight of the match against the current matrix itself.
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 4
    n_kept: int = 120
    blend: float = 0.5

    def reset(self, context: PolicyContext) -> None:
        """Start with an empty collection."""
        self.context = context
        self.kept: deque[FloatArray] = deque(maxlen=self.n_kept)
        self.current: FloatArray | None = None
        self.predicted: FloatArray | None = None

    def __call__(self, observation: Observation) -> Plan:
        """The experts of highest priority in HBM; the prefetch looks one layer ahead."""
        model, system = self.context.model, self.context.system
        n_live = max(context_entry(observation, "n_live"), 1.0)
        accuracy = self._accuracy(observation["last_load"].astype(np.float64), n_live)
        if self.current is not None and context_entry(observation, "n_admitted") > 0:
            self.kept.append(self.current)  # a request has ended
        recent = observation["ema_load"]
        seen = recent if recent.any() else observation["prefill_load"]
        self.current = shares(seen.astype(np.float64))
        self.predicted = self._match(self.current)
        early = 1 - np.arange(model.n_layers)[:, None] / model.n_layers
        budget = budget_bytes(observation)
        plan = hot_plan(
            self.predicted * early, model, system, budget, bits=self.bits, far_bits=self.bits
        )
        return replace(plan, service=Service(kind="fetch", prefetch=prefetch_at(1, accuracy)))

    def _match(self, current: FloatArray) -> FloatArray:
        """The current matrix mixed with the past one of the highest cosine."""
        if not self.kept:
            return current
        past = np.stack(self.kept)
        norms = np.linalg.norm(past, axis=(1, 2)) * np.linalg.norm(current)
        best = past[int(((past * current).sum(axis=(1, 2)) / norms).argmax())]
        mixed: FloatArray = self.blend * best + (1 - self.blend) * current
        return mixed

    def _accuracy(self, used: FloatArray, n_live: float) -> float:
        """Share of tokens that as many experts per layer as a step needs would have foreseen."""
        if self.predicted is None or not used.any():
            return 0.0
        model = self.context.model
        n_named = max(int(uniform_distinct(model, n_live)), 1)
        named = np.argsort(-self.predicted, axis=1, kind="stable")[:, :n_named]
        return float(np.take_along_axis(used, named, axis=1).sum() / used.sum())
