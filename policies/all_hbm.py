"""Every expert in HBM at the largest uniform bitwidth that fits: no far device needed."""

from ndp_gym.plan import Plan, all_hbm
from ndp_gym.policy import InfeasibleError, Observation, PolicyContext, budget_bytes


class AllHbm:
    """Where this wins, placement is unnecessary; source: ``ndp_gym.plan.all_hbm``."""

    def reset(self, context: PolicyContext) -> None:
        """Check that some width fits.

        Raises:
            InfeasibleError: not even the narrowest does.
        """
        self.context = context
        self._plan(context.hbm_budget_bytes)

    def __call__(self, observation: Observation) -> Plan:
        """The widest plan within the current budget."""
        return self._plan(budget_bytes(observation))

    def _plan(self, budget: float) -> Plan:
        plan = all_hbm(self.context.model, self.context.system, budget)
        if plan is None:
            raise InfeasibleError(
                f"no uniform stored width of all experts fits {budget:.0f} B of HBM"
            )
        return plan
