"""A uniformly random set of experts in HBM: the control that every placement must beat."""

from dataclasses import dataclass

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes


@dataclass(eq=False)
class Random:
    """Random scores over all (layer, expert), as in the placement sweeps of KTransformers.

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
        redraw: draw a new set every window instead of once per episode.
    """

    bits: int = 4
    far_bits: int = 4
    redraw: bool = False

    def reset(self, context: PolicyContext) -> None:
        """Draw the first set."""
        self.context = context
        self._draw()

    def __call__(self, observation: Observation) -> Plan:
        """As many of the drawn experts as the budget holds."""
        if self.redraw:
            self._draw()
        model, system = self.context.model, self.context.system
        budget = budget_bytes(observation)
        return hot_plan(self.score, model, system, budget, bits=self.bits, far_bits=self.far_bits)

    def _draw(self) -> None:
        self.score = self.context.rng.random(
            (self.context.model.n_layers, self.context.model.n_experts)
        )
