"""Every expert on the far device at one bitwidth: HBM holds none of them."""

from dataclasses import dataclass

from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import Observation, PolicyContext


@dataclass(eq=False)
class AllFar:
    """The reference of the reward at ``bits=4``; source: ``ndp_gym.plan.all_far``.

    Attributes:
        bits: width of every expert, or the nearest stored one.
    """

    bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Make the one plan of the episode."""
        self.plan = all_far(context.model, context.system, self.bits)

    def __call__(self, observation: Observation) -> Plan:
        """The same plan every window."""
        return self.plan
