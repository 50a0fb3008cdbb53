"""ExpertFlow, predictive cache: a forecast of all layers at once shares the slots among them."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, future_of
from ndp_gym.predictor import degraded, prefetch_at
from ndp_gym.specs import Service


@dataclass(eq=False)
class OracleExpertFlowCache:
    """arXiv 2410.17954: a small transformer tells the path of a batch through all L x E experts.

    HBM slots go to the layers by predicted demand: the most used experts over all layers. What is
    predicted and absent is fetched ahead within the step. **mechanism**: hit rates of up to 91.96 %
    are published for Switch. Approximated: the network is the true counts of the window with
    ``accuracy`` of its entries right (published: 90 to 95 %), so this is an oracle *made worse*,
    not a policy that could run; tokens are not regrouped, as a recording fixes its batches.

    Attributes:
        bits: width of the experts.
        accuracy: share of used experts that are foreseen, and of foreseen ones that are used.
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 4
    accuracy: float = 0.925

    def reset(self, context: PolicyContext) -> None:
        """Keep hold of the future."""
        self.context, self.future = context, future_of(context)

    def __call__(self, observation: Observation) -> Plan:
        """The experts of most predicted tokens in HBM, the others fetched as they are foreseen."""
        context = self.context
        truth = self.future.next_counts().sum(axis=0)
        told = degraded(truth, self.accuracy, self.accuracy, context.rng)
        budget = budget_bytes(observation)
        plan = hot_plan(
            told, context.model, context.system, budget, bits=self.bits, far_bits=self.bits
        )
        ahead = prefetch_at(max(context.model.n_layers - 1, 1), self.accuracy)
        return replace(plan, service=Service(kind="fetch", prefetch=ahead))
