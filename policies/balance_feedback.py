"""`balance` whose costs follow the clock: what the machine really takes is learnt on the way."""

from ndp_gym.layer_facts import LaneFacts
from ndp_gym.plan import Plan
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.rules import check_number
from ndp_gym.speeds import GAIN, LaneSpeeds, scaled
from policies.balance import Balance


class BalanceFeedback(Balance):
    """`Balance` and an integral term on measured seconds.

    Args:
        gain: share of the remaining error that a window corrects, 0 for plain `Balance`.
        constants: as for `Balance`.
    """

    def __init__(self, gain: float = GAIN, **constants: float) -> None:
        """Set constants by name.

        Raises:
            ValueError: a constant does not exist, or ``gain`` is not in 0..1.
        """
        super().__init__(**constants)
        check_number("gain", "in 0..1", gain)
        self.gain = gain

    def reset(self, context: PolicyContext) -> None:
        """Trust the nominal costs again."""
        super().reset(context)
        self.nominal = self.facts
        self.speeds = LaneSpeeds(1, context.model.top_k, self.gain)
        self.lane = LaneFacts(self.nominal, 1)

    def __call__(self, observation: Observation) -> Plan:
        """The balanced plan at the costs learnt so far."""
        observations = {name: array[None] for name, array in observation.items()}
        self.speeds.learn(observations, self.lane)
        table = scaled(self.nominal.table, self.speeds.factors[0])
        self.facts = self.nominal._replace(table=table)
        plan = super().__call__(observation)
        placement = plan.placement
        self.speeds.expect(observations, placement.tier[None], placement.bitwidth[None])
        return plan
