"""KTransformers: five ways to choose which experts reside on the GPU; the CPU computes the rest."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import (
    Observation,
    PolicyContext,
    budget_bytes,
    context_entry,
    profile_of,
    require_far_compute,
)

PlacementName = Literal["random", "uniform", "front", "frequency", "dynamic"]


@dataclass(eq=False)
class KTransformers:
    """The placement sweep of kvcache-ai/ktransformers (experts-sched-Tutorial.md), SOSP 2025.

    ``random``: any experts. ``uniform``: any, equally many per layer. ``front``: whole layers from
    the first. ``frequency``: the most used of the train split, over all layers. ``dynamic``: per
    layer, the most used of the live prompts. **matched**: the five curves stand in the validation
    table, on that hardware. Approximated: an update of ``dynamic`` costs link time only.

    Attributes:
        placement: one of the five.
        bits: width everywhere, or the nearest stored one (measured: FP8).
    """

    label: ClassVar[str] = "matched"
    placement: PlacementName = "frequency"
    bits: int = 8

    def __post_init__(self) -> None:
        """Check the name."""
        known = get_args(PlacementName)
        if self.placement not in known:
            raise ValueError(f"placement must be one of {known}, got {self.placement!r}")

    def reset(self, context: PolicyContext) -> None:
        """Fix the ranking, which only ``dynamic`` changes later.

        Raises:
            InfeasibleError: the far device does not compute.
            MissingProfileError: ``frequency`` without a train split.
        """
        require_far_compute(context)
        self.context = context
        self.score: NDArray[np.float64] | None = None
        shape = (context.model.n_layers, context.model.n_experts)
        if self.placement in ("random", "uniform"):
            self.score = context.rng.random(shape)
        elif self.placement == "front":
            self.score = np.repeat(-np.arange(shape[0], dtype=np.float64)[:, None], shape[1], 1)
        elif self.placement == "frequency":
            self.score = profile_of(context)

    def __call__(self, observation: Observation) -> Plan:
        """As many experts of the ranking as the budget holds."""
        is_dynamic = self.placement == "dynamic"
        if self.score is None or (is_dynamic and context_entry(observation, "n_admitted") > 0):
            self.score = observation["prefill_load"].astype(np.float64)
        return hot_plan(
            self.score,
            self.context.model,
            self.context.system,
            budget_bytes(observation),
            bits=self.bits,
            far_bits=self.bits,
            per_layer=self.placement in ("uniform", "dynamic"),
        )
