"""The hottest experts of the coming window in HBM: `ema` with a perfect forecast."""

from dataclasses import dataclass

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, future_of


@dataclass(eq=False)
class OracleHot:
    """Sees the next window's true counts, and is *not* an upper bound: moves still take time.

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
    """

    bits: int = 4
    far_bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Keep hold of the future."""
        self.context, self.future = context, future_of(context)

    def __call__(self, observation: Observation) -> Plan:
        """Top experts by the counts of the coming window, over all layers."""
        score = self.future.next_counts().sum(axis=0)
        model, system = self.context.model, self.context.system
        budget = budget_bytes(observation)
        return hot_plan(score, model, system, budget, bits=self.bits, far_bits=self.far_bits)
