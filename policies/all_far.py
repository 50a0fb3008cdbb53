"""Every expert on the far device at one bitwidth: HBM holds none of them."""

from dataclasses import dataclass

from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import InfeasibleError, Observation, PolicyContext


@dataclass(eq=False)
class AllFar:
    """The reference of the reward at ``bits=4``; source: ``ndp_gym.plan.all_far``.

    Attributes:
        bits: width of every expert; one that the system stores.
    """

    bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Make the one plan of the episode.

        Raises:
            InfeasibleError: the system does not store that width.
        """
        system = context.system
        if self.bits not in system.stored_bits:
            stored = ", ".join(map(str, system.stored_bits))
            raise InfeasibleError(f"{self.bits} bit is not stored by {system.name} ({stored} are)")
        self.plan = all_far(context.model, context.system, self.bits)

    def __call__(self, observation: Observation) -> Plan:
        """The same plan every window."""
        return self.plan
