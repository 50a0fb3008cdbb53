"""MC-MoE: widths within each layer that lose least at a given average, found exactly."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ndp_gym.bit_ladder import exact_widths
from ndp_gym.cost import cost_table
from ndp_gym.forecast import shares
from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes
from ndp_gym.quality import rel_mse_table


@dataclass(eq=False)
class McMoe:
    """The integer program of arXiv 2410.06270, solved by dynamic programming in place of a solver.

    Per layer: minimise ``sum P_e^alpha * eps_e(b_e)`` over widths of ``menu`` with an average of
    ``bits`` at most, and at least one expert at each of the two widest. **mechanism**: no speed is
    published. Approximated: P is the train profile (the first prompts where there is none); their
    gate-weight factor W^1.5 is left out, since profiles carry no gates; their loss^2 is the
    relative squared error. The paper's model is all on the GPU: here the experts with most P stay
    there until HBM is full, at the chosen widths.

    Attributes:
        bits: average width (paper: 1.5 to 2.5).
        alpha: exponent of P.
        menu: widths, those that are not stored are left out.
    """

    label: ClassVar[str] = "mechanism"
    bits: float = 2.5
    alpha: float = 1.0
    menu: tuple[int, ...] = (3, 2, 1)

    def reset(self, context: PolicyContext) -> None:
        """Forget the widths; they are chosen once per episode."""
        self.context = context
        self.usage = None if context.profile is None else shares(context.profile)
        self.widths: NDArray[np.int64] | None = None

    def __call__(self, observation: Observation) -> Plan:
        """The chosen widths, the most used experts in HBM."""
        if self.usage is None:
            self.usage = shares(observation["prefill_load"].astype(np.float64))
        if self.widths is None:
            self.widths = self._widths(self.usage)
        table = cost_table(self.context.model, self.context.system)
        size = table.weight_bytes[table.index_of[self.widths]].ravel()
        ranking = np.argsort(-self.usage, axis=None, kind="stable")
        near = np.empty(size.size, dtype=np.bool_)
        near[ranking] = np.cumsum(size[ranking]) <= budget_bytes(observation)
        tier = np.where(near.reshape(self.widths.shape), HBM, FAR)
        return Plan(
            placement=Placement(tier=tier, bitwidth=self.widths.astype(np.uint8)),
            migration_order=self.usage,
        )

    def _widths(self, usage: NDArray[np.float64]) -> NDArray[np.int64]:
        model, system = self.context.model, self.context.system
        stored = system.stored_bits
        menu = np.array([b for b in stored if b in self.menu] or [stored[-1]])
        errors = rel_mse_table(model, system, self.context.quality)
        errors = errors[..., [stored.index(int(b)) for b in menu]]
        loss = usage[..., None] ** self.alpha * errors
        budget = int(self.bits * model.n_experts)
        return np.stack([menu[exact_widths(layer, menu, budget)] for layer in loss])
