"""`balance` with a perfect forecast of the coming window."""

from ndp_gym.forecast import Forecast, known
from ndp_gym.policy import Observation, PolicyContext, context_entry, future_of
from policies.balance import Balance


class OracleBalance(Balance):
    """The same planner on the next window's true counts; clairvoyant, but *not* a bound."""

    def reset(self, context: PolicyContext) -> None:
        """Keep hold of the future."""
        super().reset(context)
        self.future = future_of(context)

    def expect(self, observation: Observation) -> Forecast:
        """The true counts of the coming window."""
        context = context_entry(observation, "n_live") * context_entry(observation, "mean_context")
        return known(self.future.next_counts(), context, self.context.model.top_k)
