"""The experts the prompts used most, equally many per layer, fixed until the next admission."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndp_gym.plan import Plan
from ndp_gym.planners import hot_plan
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry


@dataclass(eq=False)
class PrefillTopK:
    """Prefill counts predict decode (0.89 cosine in arXiv 2512.04476); KTransformers' "dynamic".

    Attributes:
        bits: width in HBM.
        far_bits: width on the far device.
    """

    bits: int = 4
    far_bits: int = 4

    def reset(self, context: PolicyContext) -> None:
        """Forget the last prompts."""
        self.context = context
        self.score: NDArray[np.float32] | None = None

    def __call__(self, observation: Observation) -> Plan:
        """Top-K of the prompts of the live requests, re-ranked when one was admitted."""
        if self.score is None or context_entry(observation, "n_admitted") > 0:
            self.score = observation["prefill_load"]
        return hot_plan(
            self.score,
            self.context.model,
            self.context.system,
            budget_bytes(observation),
            bits=self.bits,
            far_bits=self.far_bits,
            per_layer=True,
        )
