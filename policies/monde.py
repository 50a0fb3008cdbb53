"""MoNDE: per step, the busiest experts' weights go to the GPU, the others run near the data."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ndp_gym.plan import Plan, all_far
from ndp_gym.planners import hot_plan
from ndp_gym.policy import (
    Observation,
    PolicyContext,
    budget_bytes,
    profile_of,
    require_far_compute,
)
from ndp_gym.specs import Service


@dataclass(eq=False)
class Monde:
    """The rule of arXiv 2405.18832: nothing resides, as many move as makes the slower side fastest.

    With ``credit`` it is the baseline of arXiv 2512.04476 as fitted to that paper's bars: the most
    popular experts reside, and some misses are copied in the foreground and not kept. **matched**:
    both forms stand in the validation table.

    Attributes:
        bits: width everywhere (both papers: 16).
        credit: copies per expert outside HBM (0.27 reproduces the seed's baseline), or ``None`` for
            the best split.
    """

    label: ClassVar[str] = "matched"
    bits: int = 16
    credit: float | None = None

    def reset(self, context: PolicyContext) -> None:
        """Read the train profile where experts reside.

        Raises:
            InfeasibleError: the far device does not compute.
            MissingProfileError: residents are asked for, and there is no train split.
        """
        require_far_compute(context)
        self.context = context
        self.profile = None if self.credit is None else profile_of(context)

    def __call__(self, observation: Observation) -> Plan:
        """Everything far, or the most popular of each layer in HBM; the service does the rest."""
        model, system = self.context.model, self.context.system
        plan = all_far(model, system, self.bits)
        if self.profile is not None:
            budget = budget_bytes(observation)
            plan = hot_plan(
                self.profile, model, system, budget, bits=self.bits, far_bits=self.bits,
                per_layer=True,
            )  # fmt: skip
        return replace(plan, service=Service(kind="balance", credit=self.credit))
