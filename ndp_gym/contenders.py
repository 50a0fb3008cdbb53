"""Who takes part in an evaluation: what the user named, and the baselines that are always there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym import policy_calls
from ndp_gym.cost import expert_bytes
from ndp_gym.plan import Plan, all_far, all_hbm, all_hbm_mixed
from ndp_gym.policy import (
    InfeasibleError,
    Observation,
    Policy,
    PolicyContext,
    PolicyFactory,
    resolve,
)
from ndp_gym.results import ALL_FAR4, ALL_HBM_POLICIES, BASELINES
from ndp_gym.units import GB

__all__ = ["BASELINES", "Contender", "PolicyLike", "all_far4", "all_hbm_rows", "contenders"]

PolicyLike = str | Policy | PolicyFactory


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A name for the rows, and how to make a fresh policy."""

    name: str
    make: PolicyFactory


class _Fixed:
    """One plan for the whole run, made at reset."""

    def __init__(self, plan_for: Callable[[PolicyContext], Plan | None]) -> None:
        self._plan_for = plan_for

    def reset(self, context: PolicyContext) -> None:
        plan = self._plan_for(context)
        if plan is None:
            raise InfeasibleError(_too_small(context))
        self._plan = plan

    def __call__(self, observation: Observation) -> Plan:
        return self._plan


def _too_small(context: PolicyContext) -> str:
    model, system = context.model, context.system
    bits = system.stored_bits[-1]
    need = model.n_layers * model.n_experts * expert_bytes(model, system.format, bits)
    return (
        f"all experts need {need / GB:.2f} GB at {bits} bit, the narrowest stored width; "
        f"the HBM budget is {context.hbm_budget_bytes / GB:.2f} GB"
    )


def all_hbm_rows(smallest_budget: int, profile: NDArray[np.float64] | None) -> list[Contender]:
    """The rows that need no far device, within the smallest budget of the whole run.

    With ``hbm_budget="auto"`` the budget shrinks as contexts grow; a placement made for its
    smallest value never has to move anything, which favours the baseline.
    """

    def uniform(context: PolicyContext) -> Plan | None:
        return all_hbm(context.model, context.system, smallest_budget)

    def mixed(context: PolicyContext) -> Plan | None:
        return all_hbm_mixed(context.model, context.system, smallest_budget, profile)

    plans = zip(ALL_HBM_POLICIES, (uniform, mixed), strict=True)
    return [Contender(name=name, make=partial(_Fixed, plan_for)) for name, plan_for in plans]


def all_far4() -> Contender:
    """Every expert far at 4 bit, what speed-ups are quoted against."""
    make = partial(_Fixed, lambda context: all_far(context.model, context.system, 4))
    return Contender(name=ALL_FAR4, make=make)


def registered_policies() -> list[str]:
    """Bare names of ``policies.POLICIES``, each plan once.

    Empty where that package is not importable.
    """
    try:
        found = importlib.import_module("policies")
    except ModuleNotFoundError as error:
        if error.name != "policies":
            raise
        return []
    same = getattr(found, "SAME_RULES", {})
    return [name for name in found.POLICIES if name not in same]


def contenders(policies: PolicyLike | Iterable[PolicyLike]) -> list[Contender]:
    """What was asked for, without the baselines, which are there anyway."""
    if isinstance(policies, str) or not isinstance(policies, Iterable):
        policies = [policies]
    baselines = set(BASELINES)
    found = [_contender(p) for p in policies if not (isinstance(p, str) and p in baselines)]
    names = [*BASELINES, *(contender.name for contender in found)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"policies must have distinct names, got {', '.join(repeated)} twice")
    return found


def _contender(policy: PolicyLike) -> Contender:
    if isinstance(policy, str):
        return Contender(name=policy, make=partial(policy_calls.make, policy, resolve(policy)))
    is_factory = isinstance(policy, type) or not hasattr(policy, "reset")
    kind = getattr(policy, "func", policy) if is_factory else type(policy)
    name = str(getattr(policy, "name", None) or getattr(kind, "__name__", repr(policy)))
    make: Any = policy if is_factory else lambda: policy
    return Contender(name=name, make=partial(policy_calls.make, name, make))
