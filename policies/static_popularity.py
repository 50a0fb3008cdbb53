"""The most popular experts of the train split in HBM, whatever is being served now."""

from dataclasses import dataclass

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, profile_of


@dataclass(eq=False)
class StaticPopularity:
    """One ranking over all layers: Fiddler (arXiv 2402.07033), KTransformers' "frequency".

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
    """

    bits: int = 4
    far_bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Read the train profile.

        Raises:
            MissingProfileError: the recording has no train split.
        """
        self.context = context
        self.profile = profile_of(context)

    def __call__(self, observation: Observation) -> Plan:
        """As many of the popular experts as the budget holds."""
        model, system = self.context.model, self.context.system
        budget = budget_bytes(observation)
        return hot_plan(self.profile, model, system, budget, bits=self.bits, far_bits=self.far_bits)
