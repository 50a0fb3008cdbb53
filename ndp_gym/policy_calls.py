"""Calls of a policy, which may be anyone's code: what goes wrong in it is named as its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

from ndp_gym.plan import Plan, check_plan
from ndp_gym.policy import (
    InfeasibleError,
    MissingProfileError,
    Observation,
    Policy,
    PolicyContext,
    PolicyFactory,
    split_options,
)
from ndp_gym.specs import MoESpec, SystemSpec

__all__ = ["PolicyError", "ask", "check_answer", "make", "reset"]

WIDTH_OPTIONS = {"bits", "far_bits", "high", "low"}
"""Options that are one width; where they are not whole numbers they are averages."""
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
        PolicyError: it fails, or ``name`` asks for a width that the system does not store.
    """
    _check_widths(name, policy, context.system)
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


def _check_widths(name: str, policy: Policy, system: SystemSpec) -> None:
    """Refuse widths typed as options of ``name`` that the system does not store.

    Defaults of a policy may be the nearest stored width; what was asked for must not change.
    """
    if not is_dataclass(policy):
        return
    whole = {field.name for field in fields(policy) if field.type in (int, "int")}
    for option, bits in split_options(name)[1].items():
        if option in whole & WIDTH_OPTIONS and bits not in system.stored_bits:
            stored = ", ".join(map(str, system.stored_bits))
            raise PolicyError(
                f"policy {name!r}: {option} must be a width that {system.name} stores "
                f"({stored}), got {bits!r}"
            )


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Turn errors into a `PolicyError` that names the policy.

    A `ValueError` or `OSError` speaks for itself; others also show their type and place. Ctrl-C
    within compiled code, which makes a `SystemError` of it, is Ctrl-C.
    """
    try:
        yield
    except (*_PASSED_ON, PolicyError):
        raise
    except (ValueError, OSError) as error:
        raise PolicyError(f"policy {name!r}: {error}") from error
    except Exception as error:
        if isinstance(error, SystemError) and isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PolicyError(
            f"policy {name!r}: {what} raised {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno})"
        ) from error


def _short(value: object) -> str:
    """``value`` in at most 40 characters, with its type."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
