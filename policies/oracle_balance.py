"""`balance` with a perfect forecast of the coming window."""

from ndp_gym.forecast import Forecast, known
from ndp_gym.policy import Observation, PolicyContext, context_entry, future_of
from policies.balance import Balance


class OracleBalance(Balance):
    """The same planner on the next window's true counts; clairvoyant, but *not* a bound.

    It knows one window only, so moves that pay in that window alone cost it more hysteresis.

    Args:
        constants: as for `Balance`.
    """

    def __init__(self, **constants: float) -> None:
        """Set constants by name."""
        super().__init__(**{"hysteresis": 0.15, **constants})

    def reset(self, context: PolicyContext) -> None:
        """Keep hold of the future."""
        super().reset(context)
        self.future = future_of(context)

    def expect(self, observation: Observation) -> Forecast:
        """The true counts of the coming window."""
        context = context_entry(observation, "n_live") * context_entry(observation, "mean_context")
        return known(self.future.next_counts(), context, self.context.model.top_k)
