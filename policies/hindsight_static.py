"""The best-known static set in hindsight: the hottest experts of the whole run, never moved."""

from dataclasses import dataclass

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, future_of


@dataclass(eq=False)
class OracleHindsightStatic:
    """In-sample static popularity over the run; sees the future, and is *not* an upper bound.

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
    """

    bits: int = 4
    far_bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Read the totals of the coming run."""
        self.context = context
        self.score = future_of(context).total_load

    def __call__(self, observation: Observation) -> Plan:
        """As many of the hottest experts as the budget holds."""
        model, system = self.context.model, self.context.system
        budget = budget_bytes(observation)
        return hot_plan(self.score, model, system, budget, bits=self.bits, far_bits=self.far_bits)
