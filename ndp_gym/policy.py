"""Policies: the protocol, what they are told, and how a name on the command line becomes one.

A policy sees one observation per window and answers with a `Plan`. Nothing of the future reaches
it, unless it declares itself an oracle. This module never imports the package ``policies``
statically: names are looked up there only when that package is importable.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ndp_gym.plan import Plan
from ndp_gym.quality import QualityModel
from ndp_gym.specs import MoESpec, SystemSpec

Observation = Mapping[str, NDArray[np.float32]]

CONTEXT_NAMES = (
    "hbm_budget_bytes",
    "hbm_budget_share",
    "batch_size",
    "window",
    "gpu_bytes_per_s",
    "gpu_flops_per_s",
    "far_bytes_per_s",
    "far_flops_per_s",
    "link_bytes_per_s",
    "link_latency_s",
    "quality_weight",
    "n_live",
    "n_admitted",
    "mean_context",
    "tokens_generated",
    "in_flight_bytes",
    "fetch_bytes",
)
"""Entries of the observation's ``context`` vector; SI units, budget rounded toward zero.

``fetch_bytes`` were copied on demand, per decode step of the last window.
"""


class InfeasibleError(ValueError):
    """The policy has no plan within the budget: a baseline that does not fit."""


class MissingProfileError(ValueError):
    """The policy needs a train profile and the recording has no train split."""


class Patterns(NamedTuple):
    """How routing varies on a split, and what it costs, beyond mean loads.

    Attributes:
        directions: [R, L, E] orthogonal, in which loads vary together; the longer, the more.
        intensity: [L, E] share of the layer's gate energy per share of its load, as far as other
            texts keep it; 1 where gate weights were not recorded.
    """

    directions: NDArray[np.float64]
    intensity: NDArray[np.float64]


@runtime_checkable
class Future(Protocol):
    """What an ``Oracle*`` policy may ask about the rest of the run."""

    @property
    def total_load(self) -> NDArray[np.float64]:
        """[L, E] tokens per expert over all decode rows of the run."""

    def next_counts(self) -> NDArray[np.int64]:
        """[W, L, E] tokens per expert in each decode step of the coming window."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyContext:
    """What a policy is told once, before the first window of an episode.

    Attributes:
        model: the nominal model.
        system: the nominal system; the machine that runs may differ.
        batch_size: slots.
        window: decode steps between two plans.
        hbm_budget_bytes: budget at reset; the observation carries the current one.
        quality: turns relative error into nats.
        quality_weight: reward lost per nat of loss (lambda).
        menu: the (tier, bitwidth) pairs the system offers.
        rng: the policy's own generator.
        profile: [L, E] tokens per decode token on the train split, ``None`` without one.
        patterns: what else the train split says, see `ndp_gym.patterns`; computed when called,
            ``None`` without such a split.
        future: for oracles only, ``None`` for everyone else.
    """

    model: MoESpec
    system: SystemSpec
    batch_size: int
    window: int
    hbm_budget_bytes: int
    quality: QualityModel = field(default_factory=QualityModel)
    quality_weight: float = 4.0
    menu: tuple[tuple[int, int], ...] = ()
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    profile: NDArray[np.float64] | None = None
    patterns: Callable[[], Patterns | None] = lambda: None
    future: Future | None = None


class Policy(Protocol):
    """``reset`` once per episode, then one plan per observation."""

    def reset(self, context: PolicyContext) -> None:
        """Forget the last episode and read the facts of the next one."""

    def __call__(self, observation: Observation) -> Plan:
        """The plan of the coming window; arrays of the observation have no lane axis."""


PolicyFactory = Callable[[], Policy]


def context_entry(observation: Observation, name: str) -> float:
    """The entry ``name`` of the observation's context vector; see `CONTEXT_NAMES`."""
    return float(observation["context"][CONTEXT_NAMES.index(name)])


def budget_bytes(observation: Observation) -> float:
    """HBM bytes for experts in the coming window."""
    return context_entry(observation, "hbm_budget_bytes")


def profile_of(context: PolicyContext) -> NDArray[np.float64]:
    """The train profile [L, E].

    Raises:
        MissingProfileError: the recording is evaluation-only.
    """
    if context.profile is None:
        raise MissingProfileError(
            "this policy needs a train profile, and the recording has no train split: give one "
            "(--profile)"
        )
    return context.profile


def require_far_compute(context: PolicyContext) -> None:
    """Check that the far device computes, for policies that leave experts there.

    Raises:
        InfeasibleError: it only stores.
    """
    system = context.system
    if not system.far.can_compute:
        raise InfeasibleError(
            f"this policy computes experts on the far device, and that of {system.name} "
            f"({system.far.name}) only stores"
        )


def future_of(context: PolicyContext) -> Future:
    """The future, for oracles.

    Raises:
        ValueError: the run does not offer one.
    """
    if context.future is None:
        raise ValueError("an oracle needs context.future, which only an evaluation run offers")
    return context.future


def needs_future(policy: object) -> bool:
    """Whether ``policy`` (an instance, a class or a factory of `resolve`) is an oracle."""
    target = policy.func if isinstance(policy, partial) else policy
    kind = target if isinstance(target, type) else type(target)
    return kind.__name__.startswith("Oracle") or bool(getattr(target, "needs_future", False))


def resolve(name: str) -> PolicyFactory:
    """The factory that ``name`` means; calling it gives a fresh policy.

    ``name`` is ``module:attribute``, ``file.py:Attribute`` or a bare name of
    ``policies.POLICIES``. Options follow after one more colon, ``all_far:bits=3`` or
    ``my_policy.py:Mine:alpha=0.5,mode=fast``; they are keyword arguments of the factory. An entry
    of ``POLICIES`` may carry options itself; those given in ``name`` win.

    Raises:
        ValueError: the policy does not exist (near matches are listed), its file or module fails
            to load (the message says why), or it does not take the options.
    """
    target, options = split_options(name)
    if ":" in target:
        return _with_options(_load(target), options, name)
    if target.endswith(".py"):
        raise ValueError(f"policy {name!r} is a file: add the class: {target}:Name")
    entry = _registered(target)
    if isinstance(entry, str):
        entry, defaults = split_options(entry)
        options = {**defaults, **options}
        entry = _load(entry)
    return _with_options(entry, options, name)


def split_options(name: str) -> tuple[str, dict[str, Any]]:
    """``("a:b", {"k": 1})`` from ``"a:b:k=1"``."""
    target, colon, tail = name.rpartition(":")
    if not colon or "=" not in tail:
        return name, {}
    options = {}
    for item in tail.split(","):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(
                f"policy {name!r}: options must read key=value,key=value, got {item!r}"
            )
        options[key.strip()] = _literal(value.strip())
    return target, options


def _literal(text: str) -> Any:
    """A Python literal where ``text`` is one (3, 0.5, True), else the string itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _registered(name: str) -> Any:
    """The entry ``name`` of ``policies.POLICIES``."""
    try:
        policies = importlib.import_module("policies")
    except ModuleNotFoundError as error:
        if error.name != "policies":
            raise ValueError(f"package policies could not be loaded: {_reason(error)}") from error
        raise ValueError(
            f"policy {name!r} is a bare name, and the package 'policies' is not importable here: "
            "name it as module:attribute or file.py:Attribute"
        ) from None
    known: Mapping[str, Any] = policies.POLICIES
    if name not in known:
        raise ValueError(_unknown("policy", name, known) + "; or name it as module:attribute")
    return known[name]


def _load(target: str) -> Any:
    """The attribute that ``module:attribute`` or ``file.py:Attribute`` names."""
    source, _, attribute = target.rpartition(":")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if _is_public(key, value, module)]
        raise ValueError(_unknown(f"in {source}, policy", attribute, public))
    return getattr(module, attribute)


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"policy module {name!r} was not found") from None
        raise ValueError(f"policy module {name!r} could not be loaded: {_reason(error)}") from error
    except Exception as error:
        raise ValueError(f"policy module {name!r} could not be loaded: {_reason(error)}") from error


def _load_file(path: Path) -> ModuleType:
    """Run a policy file as a module of its own, registered so that dataclasses and pickle work."""
    if not path.is_file():
        raise ValueError(f"policy file {str(path)!r} was not found")
    name = f"_ndp_gym_policy_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"policy file {str(path)!r} could not be loaded: {_reason(error)}"
        ) from error
    return module


def _with_options(target: Any, options: dict[str, Any], name: str) -> PolicyFactory:
    """``target`` as a factory with ``options`` bound, checked against its signature."""
    if not callable(target):
        raise ValueError(
            f"policy {name!r} must name a class or a function, got {type(target).__name__}"
        )
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(target).parameters) or "none"
        raise ValueError(f"policy {name!r}: {error} (options: {takes})") from None
    factory: PolicyFactory = partial(target, **options)
    return factory


def _is_public(name: str, value: object, module: ModuleType) -> bool:
    """Whether a name of ``module`` may be meant as one of its policies."""
    own = getattr(value, "__module__", None) == module.__name__
    return callable(value) and own and not name.startswith("_")


def _unknown(what: str, name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=3, cutoff=0.7)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{what} {name!r} is unknown: {hint}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
