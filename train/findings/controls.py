"""Controls for what prompts are worth: the same policy, shown something else than the prompts.

Such a control places as many experts at the same widths, so that only the ranking differs. (Put
beside `static_popularity`, `prefill_topk` also differs in how many experts it places: it takes the
same number in every layer and rounds down.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ndp_gym.plan import Plan
from ndp_gym.policy import Policy, PolicyContext, profile_of, resolve

Observation = Mapping[str, NDArray[np.float32]]


class _Shown:
    """A policy whose observation of the prompts is replaced by one [L, E] array per episode."""

    def __init__(self, policy: str) -> None:
        self.policy: Policy = resolve(policy)()

    def reset(self, context: PolicyContext) -> None:
        shown = self._instead(context).astype(np.float32)
        share = shown / shown.sum(axis=1, keepdims=True)
        self.instead = {"prefill_load": shown, "gate_share": share}
        self.policy.reset(context)

    def __call__(self, observation: Observation) -> Plan:
        return self.policy({**observation, **self.instead})

    def _instead(self, context: PolicyContext) -> NDArray[np.float64]:
        raise NotImplementedError


class ShownPopularity(_Shown):
    """Sees the popularity on the train split."""

    def _instead(self, context: PolicyContext) -> NDArray[np.float64]:
        return profile_of(context)


class ShownNoise(_Shown):
    """Sees random numbers."""

    def _instead(self, context: PolicyContext) -> NDArray[np.float64]:
        return context.rng.random((context.model.n_layers, context.model.n_experts))


CONTROLS = {"popularity": "ShownPopularity", "noise": "ShownNoise"}


def control(policy: str, kind: str) -> str:
    """The name of ``policy`` that is shown ``kind`` (of `CONTROLS`) instead of prompts."""
    return f"{__name__}:{CONTROLS[kind]}:policy={policy}"
