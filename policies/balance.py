"""Balance GPU and far device layer by layer, bits where quality is cheapest: the one to beat."""

import numpy as np
from numpy.typing import NDArray

from ndp_gym.forecast import Forecast, Forecaster
from ndp_gym.plan import HBM, Plan
from ndp_gym.planners import Copies, Guesses, balance, constants_of, facts_of
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry


class Balance:
    """The planner of `ndp_gym.planners`, asked anew every window.

    Args:
        constants: fields of `Knobs` (gpu_factor, far_factor, price, hysteresis,
            migration_cap, min_gain, moves) and of
            `Blend` (prefill_tokens, decay, floor, gates, intensity).
    """

    def __init__(self, **constants: float) -> None:
        """Set constants by name, the others keep their defaults.

        Raises:
            ValueError: a constant does not exist.
        """
        self.knobs, self.blend = constants_of(constants)

    def reset(self, context: PolicyContext) -> None:
        """Read the nominal costs; nothing is planned yet."""
        self.context = context
        self.facts = facts_of(
            context.model, context.system, context.quality, context.quality_weight, context.window
        )
        self.forecaster = Forecaster(self.blend, context.model.top_k, context.profile)
        self.guesses: Guesses = ()
        self.planned = np.zeros((context.model.n_layers, context.model.n_experts), np.int64)

    def __call__(self, observation: Observation) -> Plan:
        """The balanced plan for the blend of past loads."""
        if context_entry(observation, "n_admitted") > 0:
            self.guesses = ()
        plan, self.guesses = balance(
            self.facts,
            self.expect(observation),
            self._copies(observation),
            budget_bytes(observation),
            self.knobs,
            self.guesses,
        )
        self.planned = plan.placement.bitwidth.astype(np.int64)
        return plan

    def expect(self, observation: Observation) -> Forecast:
        """Routing of the coming window: prefill of new requests, averages of old ones."""
        return self.forecaster(observation)

    def _copies(self, observation: Observation) -> Copies:
        present: NDArray[np.int64] = np.where(
            observation["tier"] == HBM, observation["bitwidth"], 0
        ).astype(np.int64)
        return Copies(planned=self.planned, present=present)
