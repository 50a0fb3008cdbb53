"""Calls of a policy, which may be anyone's code: what goes wrong in it is named as its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ndp_gym.plan import Plan, check_plan
from ndp_gym.policy import (
    InfeasibleError,
    MissingProfileError,
    Observation,
    Policy,
    PolicyContext,
    PolicyFactory,
)
from ndp_gym.specs import MoESpec, SystemSpec

__all__ = ["PolicyError", "ask", "check_answer", "make", "reset"]

_PASSED_ON = (InfeasibleError, MissingProfileError, MemoryError)


class PolicyError(ValueError):
    """A policy failed, or is none; ``__cause__`` holds what it raised, traceback and all."""


def make(name: str, factory: PolicyFactory) -> Policy:
    """A fresh policy.

    Raises:
        PolicyError: the factory fails, or what it makes has no ``reset`` or cannot be called.
    """
    with _named(name, "making it"):
        policy = factory()
    for method in ("reset", "__call__"):
        if not callable(getattr(policy, method, None)):
            raise PolicyError(
                f"policy {name!r} must have reset(context) and __call__(observation) -> Plan, "
                f"but {type(policy).__name__} has no {method}"
            )
    return policy


def reset(name: str, policy: Policy, context: PolicyContext) -> None:
    """Tell ``policy`` what it faces.

    Raises:
        PolicyError: it fails.
    """
    with _named(name, "reset"):
        policy.reset(context)


def ask(name: str, policy: Policy, observation: Observation) -> Plan:
    """The policy's answer.

    Raises:
        PolicyError: it fails, or the answer is no plan.
    """
    with _named(name, "__call__"):
        plan: object = policy(observation)
    if not isinstance(plan, Plan):
        raise PolicyError(f"policy {name!r}: __call__ must return a Plan, got {_short(plan)}")
    return plan


def check_answer(name: str, plan: Plan, model: MoESpec, system: SystemSpec) -> None:
    """Raise `PolicyError` where ``plan`` does not fit model or system."""
    with _named(name, "its plan"):
        check_plan(plan, model, system)


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Turn errors into a `PolicyError` that names the policy; a `ValueError` speaks for itself."""
    try:
        yield
    except (*_PASSED_ON, PolicyError):
        raise
    except ValueError as error:
        raise PolicyError(f"policy {name!r}: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PolicyError(
            f"policy {name!r}: {what} raised {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno})"
        ) from error


def _short(value: object) -> str:
    """``value`` in at most 40 characters, with its type."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
