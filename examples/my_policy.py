"""A policy of your own: ``ndp-gym evaluate --policies examples/my_policy.py:Recent,balance``."""

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes


class Recent:
    """Keeps in HBM what the last window used most; the prompts rank it at first."""

    def reset(self, context: PolicyContext) -> None:
        """An episode begins: what a policy may know of model and system."""
        self.context = context

    def __call__(self, observation: Observation) -> Plan:
        """The plan of the coming window; arrays are [L, E], see docs/env.md."""
        last = observation["last_load"]
        load = last if last.any() else observation["prefill_load"]
        model, system = self.context.model, self.context.system
        return hot_plan(load, model, system, budget_bytes(observation), bits=3, far_bits=3)
