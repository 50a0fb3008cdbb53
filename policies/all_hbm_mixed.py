"""Every expert in HBM, bits where the prompts' load says they matter: no far device needed."""

import numpy as np

from ndp_gym.plan import Plan, all_hbm_mixed
from ndp_gym.policy import (
    InfeasibleError,
    Observation,
    PolicyContext,
    budget_bytes,
    context_entry,
)


class AllHbmMixed:
    """Widths by gate energy, renewed when requests are admitted; ``ndp_gym.plan.all_hbm_mixed``.

    The fair opponent of every placement: mixed bitwidths under the same budget.
    """

    def reset(self, context: PolicyContext) -> None:
        """Check that the narrowest width fits.

        Raises:
            InfeasibleError: it does not.
        """
        self.context = context
        self.load = np.ones((context.model.n_layers, context.model.n_experts))
        self._plan(context.hbm_budget_bytes)

    def __call__(self, observation: Observation) -> Plan:
        """The mixed plan for the requests admitted last, within the current budget."""
        if context_entry(observation, "n_admitted") > 0:
            self.load = observation["gate_share"].astype(np.float64)
        return self._plan(budget_bytes(observation))

    def _plan(self, budget: float) -> Plan:
        plan = all_hbm_mixed(self.context.model, self.context.system, budget, self.load)
        if plan is None:
            raise InfeasibleError(
                f"the narrowest copies of all experts exceed {budget:.0f} B of HBM"
            )
        return plan
