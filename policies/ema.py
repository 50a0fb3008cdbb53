"""The experts with the highest recent load in HBM, re-ranked every window."""

from dataclasses import dataclass

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes


@dataclass(eq=False)
class Ema:
    """Route-EMA hotness, asynchronous promotion: the placement half of DynaExq (arXiv 2511.15015).

    Prompts stand in for the average before the first window. No hysteresis: it moves whatever
    climbs over the budget line.

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
    """

    bits: int = 4
    far_bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Nothing to forget: the average is part of the observation."""
        self.context = context

    def __call__(self, observation: Observation) -> Plan:
        """The hottest experts over all layers that the budget holds."""
        average = observation["ema_load"]
        score = average if average.any() else observation["prefill_load"]
        model, system = self.context.model, self.context.system
        budget = budget_bytes(observation)
        return hot_plan(score, model, system, budget, bits=self.bits, far_bits=self.far_bits)
