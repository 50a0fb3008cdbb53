"""`balance` with a perfect forecast of the coming window."""

from ndp_gym.forecast import Forecast, known, mixed
from ndp_gym.policy import Observation, PolicyContext, context_entry, future_of
from policies.balance import Balance


class OracleBalance(Balance):
    """The same planner on the next window's true counts; clairvoyant, but *not* a bound.

    What is placed outlives the window, so the counts are mixed with what `Balance` expects.

    Args:
        truth: weight of the true counts, 1 for a planner that looks no further than the window.
        constants: as for `Balance`.
    """

    def __init__(self, truth: float = 0.6, **constants: float) -> None:
        """Set constants by name."""
        super().__init__(**constants)
        self.truth = truth

    def reset(self, context: PolicyContext) -> None:
        """Keep hold of the future."""
        super().reset(context)
        self.future = future_of(context)

    def expect(self, observation: Observation) -> Forecast:
        """The true counts of the coming window, mixed with the usual forecast of those after it."""
        context = context_entry(observation, "n_live") * context_entry(observation, "mean_context")
        counts = known(self.future.next_counts(), context, self.context.model.top_k)
        return mixed(counts, super().expect(observation), self.truth)
