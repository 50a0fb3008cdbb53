"""ExpertFlow, adaptive horizon: how many layers ahead to prefetch, corrected by what happens."""

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import numpy as np

from ndp_gym.cost import cost_table, uniform_distinct
from ndp_gym.plan import Plan, all_far, nearest_width
from ndp_gym.policy import Observation, PolicyContext, context_entry
from ndp_gym.predictor import accuracy_at, prefetch_at
from ndp_gym.specs import Service

GPU_S, _, LINK_S, STALL_S = range(4)  # columns of the observation's "layer"


@dataclass(eq=False)
class ExpertFlow:
    """arXiv 2510.26730: the horizon is the copying time of a layer's experts over the layer's time.

    Then, per window: S + 1 where stalls exceed ``stall``, S - 1 where the link is saturated, where
    copies in vain cost more than they hide. Accuracy falls with distance, ``c + (p - c)
    exp(-decay (S - 1))``; c = 0.634, 0.653, 0.605 is published for its predictor on
    DeepSeek-V2-Lite, Qwen1.5 and Qwen2, 0.264, 0.333, 0.296 for a pre-gate; p and decay are
    assumed. **mechanism**: stall time -98.5 % is published with hit rates that are not.
    Approximated: one LRU per layer in place of the two-level one; accuracy is a number, not a
    forest.

    Attributes:
        bits: width of the experts.
        near: p, accuracy one layer ahead.
        floor: c, accuracy far ahead.
        decay: per layer.
        stall: share of the layers' time above which the horizon grows.
        longest: horizon it never exceeds, in layers.
        adaptive: ``False`` keeps the first horizon.
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 4
    near: float = 0.9
    floor: float = 0.634
    decay: float = 0.5
    stall: float = 0.05
    longest: int = 8
    adaptive: bool = True

    def reset(self, context: PolicyContext) -> None:
        """Forget the horizon."""
        self.context = context
        self.table = cost_table(context.model, context.system)
        self.plan = all_far(context.model, context.system, self.bits)
        self.horizon: int | None = None

    def __call__(self, observation: Observation) -> Plan:
        """Fetch with a per-layer cache, prefetching at the current horizon."""
        measured = observation["layer"].astype(np.float64).sum(axis=0)
        if self.horizon is None:
            self.horizon = self._first_horizon(max(context_entry(observation, "n_live"), 1.0))
        elif self.adaptive and measured.any():
            layers_s = self.table.layer_s.sum() + measured[GPU_S] + measured[STALL_S]
            if measured[LINK_S] > 0.95 * layers_s:
                self.horizon -= 1
            elif measured[STALL_S] > self.stall * layers_s:
                self.horizon += 1
        self.horizon = min(max(self.horizon, 1), self.longest)
        accuracy = accuracy_at(self.horizon, self.near, self.floor, self.decay)
        ahead = prefetch_at(self.horizon, accuracy)
        service = Service(kind="fetch", cache="lru", scope="layer", prefetch=ahead)
        return replace(self.plan, service=service)

    def _first_horizon(self, n_live: float) -> int:
        """Copying time of the experts a layer is expected to use, in layers."""
        width = int(self.table.index_of[nearest_width(self.context.system, self.bits)])
        n_experts = float(uniform_distinct(self.context.model, n_live))
        gpu_s = self.table.gpu_launch_s[width] + n_experts * self.table.gpu_weight_s[width]
        layer_s = float(self.table.layer_s.mean()) + gpu_s
        return ceil(n_experts * float(self.table.copy_s[width]) / float(layer_s))
