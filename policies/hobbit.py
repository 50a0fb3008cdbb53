"""HOBBIT: a cache of experts whose misses are fetched wide or narrow by router rank."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ndp_gym.plan import Plan, all_far, nearest_width
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.predictor import accuracy_at, prefetch_at
from ndp_gym.specs import Service

NEXT_LAYER, LATER_LAYERS, DECAY = 0.96, 0.90, 2.0
"""Prediction by stacked gates: 96 % one layer ahead, about 90 % two or three (decay assumed)."""


@dataclass(eq=False)
class Hobbit:
    """Mixed-precision offloading of arXiv 2411.01433, with everything computed on the GPU.

    A miss is fetched at ``high`` bits if the gate weights of the better-ranked experts add up to
    ``first`` at most, else at ``low``; the first choice is always high. **matched**: the ratio to
    the seed policy stands in the validation table, by means. Approximated: the weights are the
    model's mean profile by rank, not the token's; what is beyond the paper's second threshold
    (3 %) is fetched low, not skipped; eviction is LRU per layer, not the weighted score.

    Attributes:
        high: width of important misses (paper: 16, with 4; or 8 with 2).
        low: width of the others.
        first: the paper's T1 for Mixtral.
        depth: layers that the prefetch looks ahead.
    """

    label: ClassVar[str] = "matched"
    high: int = 16
    low: int = 4
    first: float = 0.6
    depth: int = 1

    def reset(self, context: PolicyContext) -> None:
        """Make the one plan of the episode; the kernel runs cache and prefetch."""
        model, system = context.model, context.system
        gates = np.asarray(model.gate_profile or np.ones(model.top_k), dtype=np.float64)
        before = np.concatenate([[0.0], np.cumsum(gates)[:-1]]) / gates.sum()
        high, low = nearest_width(system, self.high), nearest_width(system, self.low)
        accuracy = accuracy_at(self.depth, NEXT_LAYER, LATER_LAYERS, DECAY)
        service = Service(
            kind="fetch",
            cache="lru",
            scope="layer",
            rank_bits=tuple(high if weight <= self.first else low for weight in before),
            prefetch=prefetch_at(self.depth, accuracy),
        )
        self.plan = replace(all_far(model, system, low), service=service)

    def __call__(self, observation: Observation) -> Plan:
        """The same plan every window."""
        return self.plan
