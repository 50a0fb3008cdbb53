"""Mixtral-offloading: a per-layer LRU cache, and the next layer's experts guessed and fetched."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.predictor import prefetch_at
from ndp_gym.specs import Service


@dataclass(eq=False)
class MixtralOffloading:
    """arXiv 2312.17238: k quantised experts per layer cached, the next layer's gate looks ahead.

    **mechanism**: its devices are not among the presets. Approximated: the guess's accuracy on
    Mixtral is that of the same construction in arXiv 2501.10375 (84.1 %), and k is what the budget
    holds.

    Attributes:
        bits: width of the experts (paper: 2 to 4, HQQ).
        accuracy: of the guess; 0 switches prefetching off.
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 3
    accuracy: float = 0.841

    def reset(self, context: PolicyContext) -> None:
        """Make the one plan of the episode; the kernel runs cache and prefetch."""
        ahead = prefetch_at(1, self.accuracy) if self.accuracy > 0 else None
        service = Service(kind="fetch", cache="lru", scope="layer", prefetch=ahead)
        self.plan = replace(all_far(context.model, context.system, self.bits), service=service)

    def __call__(self, observation: Observation) -> Plan:
        """The same plan every window."""
        return self.plan
