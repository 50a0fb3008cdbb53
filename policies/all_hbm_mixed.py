"""Every expert in HBM, bits where the prompts' load says they matter: no far device needed."""

import numpy as np

from ndp_gym.plan import Plan, all_hbm_mixed
from ndp_gym.policy import InfeasibleError, Observation, PolicyContext, budget_bytes


class AllHbmMixed:
    """Widths by gate energy of the train split, else of the first prompts; never changed.

    The fair opponent of every placement: mixed bitwidths under the same budget. A new mixture is
    made only where the budget has shrunk. Source: ``ndp_gym.plan.all_hbm_mixed``.
    """

    def reset(self, context: PolicyContext) -> None:
        """Check that the narrowest width fits.

        Raises:
            InfeasibleError: it does not.
        """
        self.context, self.load = context, context.profile
        self.plan, self.planned_for = self._plan(context.hbm_budget_bytes), np.inf

    def __call__(self, observation: Observation) -> Plan:
        """The mixed plan for the smallest budget so far."""
        if self.load is None:
            self.load = observation["gate_share"].astype(np.float64)
        budget = budget_bytes(observation)
        if budget < self.planned_for:
            self.plan, self.planned_for = self._plan(budget), budget
        return self.plan

    def _plan(self, budget: float) -> Plan:
        plan = all_hbm_mixed(self.context.model, self.context.system, budget, self.load)
        if plan is None:
            raise InfeasibleError(
                f"the narrowest copies of all experts exceed {budget:.0f} B of HBM"
            )
        return plan
