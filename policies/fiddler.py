"""Fiddler: popular experts reside; an absent one is computed where it is, or copied, by cost."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable, cost_table
from ndp_gym.forecast import shares
from ndp_gym.plan import Plan, nearest_width
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry, profile_of
from ndp_gym.specs import Service


@dataclass(eq=False)
class Fiddler:
    """arXiv 2402.07033: one global popularity ranking, and the cheaper device for the rest.

    An absent expert with s tokens costs ``s * c_cpu`` in place or one copy; the paper measured 7
    and 70 ms, here both come from the nominal system. As in its code the *sum* over experts
    decides, not the slower side. **mechanism**: the published > 3 tok/s is a lower bound only.
    Approximated: the paper decides per layer and step, here per window by expected tokens.

    Attributes:
        bits: width everywhere (paper: 16).
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 16

    def reset(self, context: PolicyContext) -> None:
        """Read the train profile and the nominal costs.

        Raises:
            MissingProfileError: the recording has no train split.
        """
        self.context = context
        self.profile = profile_of(context)
        self.table = cost_table(context.model, context.system)

    def __call__(self, observation: Observation) -> Plan:
        """The popular experts that fit, and the service whose expected cost is the lower."""
        model, system = self.context.model, self.context.system
        plan = hot_plan(
            self.profile, model, system, budget_bytes(observation), bits=self.bits,
            far_bits=self.bits,
        )  # fmt: skip
        n_tokens = max(context_entry(observation, "n_live"), 1.0)
        chance = np.minimum(model.top_k * shares(self.profile), 1.0)
        absent = chance[plan.placement.tier != 0]
        width = int(self.table.index_of[nearest_width(system, self.bits)])
        stay = system.far.can_compute and stays(self.table, width, absent, n_tokens)
        return replace(plan, service=Service(kind="in_place" if stay else "fetch"))


def stays(table: CostTable, width: int, chance: NDArray[np.float64], n_tokens: float) -> bool:
    """Whether computing far costs less, over absent experts that each token uses by ``chance``."""
    active = 1 - (1 - chance) ** n_tokens
    tokens = n_tokens * chance / np.maximum(active, 1e-12)  # of an expert that is used at all
    rows_s = table.far_token_s[width] * np.maximum(tokens, table.far_min_tokens)
    far_s = np.maximum(table.far_weight_s[width], rows_s)
    copied_s = table.copy_s[width] + table.gpu_weight_s[width]
    return bool((active * far_s).sum() <= (active * copied_s).sum())
