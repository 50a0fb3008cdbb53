"""The seed policy: prefill-guided top-K in HBM at 16 bit, an importance-ordered bit ladder far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndp_gym.bit_ladder import bit_ladder
from ndp_gym.cost import expert_bytes
from ndp_gym.forecast import shares
from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry
from ndp_gym.quality import rel_mse_table

FloatArray = NDArray[np.float64]


@dataclass(eq=False)
class ContextAware:
    """Algorithm 1 of arXiv 2512.04476, planned once per admission and fixed during decode.

    Importance S = alpha * counts + (1 - alpha) * gate share, both of the prompts and normalised in
    the layer. Per layer the top K by S go to HBM, K = budget / (L W(16)); where that is 0, HBM uses
    the widest stored copy that gives K >= 1. The rest get widths <= 4 in order of S: a search over
    how many get each width maximises the error avoided under an average of ``bits``. The loss of a
    width is the format's relative error times the expert's gate share (the paper measured it).

    Attributes:
        bits: average width of the far experts (the paper's 3 or 2).
        alpha: weight of counts against gate share.
    """

    bits: float = 3
    alpha: float = 0.5

    def reset(self, context: PolicyContext) -> None:
        """Forget the last plan."""
        self.context = context
        self.errors = np.asarray(rel_mse_table(context.model, context.system, context.quality))
        self.plan: Plan | None = None

    def __call__(self, observation: Observation) -> Plan:
        """A new plan where a request was admitted, else the last one."""
        if self.plan is None or context_entry(observation, "n_admitted") > 0:
            self.plan = self._plan(observation)
        return self.plan

    def _plan(self, observation: Observation) -> Plan:
        model, system = self.context.model, self.context.system
        gates = shares(observation["gate_share"].astype(np.float64))
        counts = shares(observation["prefill_load"].astype(np.float64))
        importance = self.alpha * counts + (1 - self.alpha) * gates
        ranking = np.argsort(-importance, axis=1, kind="stable")
        n_hot, hot_bits = self._hot(budget_bytes(observation))
        far = ranking[:, n_hot:]
        stored = np.asarray(system.stored_bits)
        menu = np.flatnonzero(stored <= max(4, stored[-1]))
        rows = np.arange(model.n_layers)[:, None]
        loss = gates[rows, far][..., None] * self.errors[rows, far][..., menu]
        bits = np.full(importance.shape, hot_bits)
        np.put_along_axis(bits, far, bit_ladder(loss, stored[menu], self.bits), axis=1)
        tier = np.full(importance.shape, HBM)
        np.put_along_axis(tier, far, FAR, axis=1)
        return Plan(placement=Placement(tier=tier, bitwidth=bits), migration_order=importance)

    def _hot(self, budget: float) -> tuple[int, int]:
        """K per layer and its width."""
        model, system = self.context.model, self.context.system
        for bits in system.stored_bits:
            count = int(budget // (model.n_layers * expert_bytes(model, system.format, bits)))
            if count >= 1:
                return min(count, model.n_experts), bits
        return 0, system.stored_bits[0]
