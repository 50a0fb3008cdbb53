"""What episodes draw their conditions from: `Conditions`, and the presets behind the env's ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.condition import KINDS, Condition, Kind, Process, Speeds, nominal_system, slowed
from ndp_gym.rules import check_number
from ndp_gym.schedule import check_count
from ndp_gym.specs import SystemSpec

__all__ = ["CONDITIONS", "Condition", "Conditions", "Disturbance", "Hidden", "find_conditions"]

Range = tuple[float, float]
IntArray = NDArray[np.int64]
_SAME: Range = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Ranges of actual over nominal speed in (0, 1]; uniform, constant within an episode."""

    gpu: Range = _SAME
    far: Range = _SAME
    link: Range = _SAME

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: one is not a range in (0, 1].
        """
        for name in ("gpu", "far", "link"):
            _check_factors(f"hidden {name}", getattr(self, name), most=1.0)


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """How a `Process` is drawn; factors and whole numbers are uniform between two ends.

    Attributes:
        kind: what happens.
        chance: probability that an episode has it.
        factor: speed or budget at its worst.
        onset, length, ramp: windows, see `Process`.
    """

    kind: Kind
    chance: float = 0.5
    factor: Range
    onset: tuple[int, int] = (4, 32)
    length: tuple[int, int] = (16, 48)
    ramp: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Check kind, chance and ranges.

        Raises:
            ValueError: one is out of range.
        """
        if self.kind not in KINDS:
            raise ValueError(f"drift kind must be one of {list(KINDS)}, got {self.kind!r}")
        check_number(f"{self.kind} chance", "in 0..1", self.chance)
        _check_factors(f"{self.kind} factor", self.factor, most=1.0)
        for name, least in (("onset", 0), ("length", 1), ("ramp", 0)):
            _check_counts(f"{self.kind} {name}", getattr(self, name), least)

    def draw(self, rng: np.random.Generator) -> Process | None:
        """A process, or none; five numbers are drawn either way."""
        chance, share, *shares = rng.random(5).tolist()
        spans = self.onset, self.length, self.ramp
        onset, length, ramp = (
            low + int(s * (high - low + 1)) for s, (low, high) in zip(shares, spans, strict=True)
        )
        if chance >= self.chance:
            return None
        factor = _between(self.factor, share)
        return Process(kind=self.kind, onset=onset, length=length, ramp=ramp, factor=factor)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What episodes draw from; what is left out stays as the environment's arguments have it.

    Factors, budgets and contexts are drawn log-uniformly.

    Attributes:
        batch_sizes: one of them.
        hbm_budget: between two shares of all routed-expert bytes at 16 bit.
        link_bandwidth, far_bandwidth, far_compute: factors of the nominal system, which policies
            are told.
        extra_context: tokens put before every request's context.
        quality_weights: one of them, 1 / nat.
        mix: concentration of the domains' weights (Dirichlet): the smaller, the fewer domains come
            first; ``None``: a plain permutation of the requests.
        hidden: actual speeds, which policies are not told.
        drift: what may happen on the way.
        domain_change: chance that requests come domain by domain.

    Raises:
        ValueError: a number is out of range.
    """

    batch_sizes: tuple[int, ...] = ()
    hbm_budget: Range | None = None
    link_bandwidth: Range = _SAME
    far_bandwidth: Range = _SAME
    far_compute: Range = _SAME
    extra_context: tuple[int, int] = (0, 0)
    quality_weights: tuple[float, ...] = ()
    mix: float | None = None
    hidden: Hidden = field(default_factory=Hidden)
    drift: tuple[Disturbance, ...] = ()
    domain_change: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        for size in self.batch_sizes:
            check_count("every one of batch_sizes", size)
        if self.hbm_budget is not None:
            _check_factors("hbm_budget", self.hbm_budget, most=1.0)
        for name in ("link_bandwidth", "far_bandwidth", "far_compute"):
            _check_factors(name, getattr(self, name))
        _check_counts("extra_context", self.extra_context, 0)
        for weight in self.quality_weights:
            if not (isfinite(weight) and weight >= 0):
                raise ValueError(f"quality_weights must be finite and >= 0, got {weight}")
        if self.mix is not None:
            _check_factors("mix", (self.mix, self.mix))
        check_number("domain_change", "in 0..1", self.domain_change)

    def draw(self, rng: np.random.Generator, base: Condition) -> Condition:
        """What one episode runs under; no number is drawn for what has no range."""
        drawn: dict[str, Any] = {}
        if self.hbm_budget is not None:
            drawn["hbm_budget"] = _log_uniform(rng, self.hbm_budget)
        if self.batch_sizes:
            drawn["batch_size"] = self.batch_sizes[rng.integers(len(self.batch_sizes))]
        factors = [
            1.0 if span == _SAME else _log_uniform(rng, span)
            for span in (self.link_bandwidth, self.far_bandwidth, self.far_compute)
        ]
        drawn["system"] = nominal_system(base.system, *factors)
        if base.actual is not None:
            drawn["actual"] = nominal_system(base.actual, *factors)
        low, high = self.extra_context
        if high:
            drawn["extra_context"] = round(_log_uniform(rng, (low + 1.0, high + 1.0))) - 1
        if self.quality_weights:
            chosen = rng.integers(len(self.quality_weights))
            drawn["quality_weight"] = float(self.quality_weights[chosen])
        hidden = self.hidden.gpu, self.hidden.far, self.hidden.link
        if any(span != _SAME for span in hidden):
            shares = rng.random(3).tolist()
            drawn["speeds"] = Speeds(*map(_between, hidden, shares))
        processes = [disturbance.draw(rng) for disturbance in self.drift]
        drawn["processes"] = tuple(process for process in processes if process is not None)
        if self.domain_change:
            drawn["domain_change"] = rng.random() < self.domain_change
        return replace(base, **drawn)

    def draw_episode(
        self, rng: np.random.Generator, base: Condition, requests: IntArray, domain: IntArray
    ) -> tuple[IntArray, Condition]:
        """The order of ``requests`` (indices into the request table) and what they run under.

        ``domain`` is that of every request of the table.
        """
        order = rng.permutation(requests)
        condition = self.draw(rng, base)
        if self.mix is None and not condition.domain_change:
            return order, condition
        kinds, kind = np.unique(domain[order], return_inverse=True)
        if self.mix is not None:  # exponential clocks: a domain of twice the weight comes as soon
            weights = rng.dirichlet(np.full(kinds.size, self.mix)) + 1e-9
            turn = np.argsort(rng.exponential(size=order.size) / weights[kind], kind="stable")
            order, kind = order[turn], kind[turn]
        if condition.domain_change:
            order = order[np.argsort(rng.permutation(kinds.size)[kind], kind="stable")]
        return order, condition

    def widest(self, base: Condition) -> Condition:
        """Largest batch, budget, context and quality weight, on the fastest nominal system."""
        fastest = self.link_bandwidth[1], self.far_bandwidth[1], self.far_compute[1]
        return replace(
            base,
            batch_size=max(self.batch_sizes, default=base.batch_size),
            hbm_budget=base.hbm_budget if self.hbm_budget is None else self.hbm_budget[1],
            quality_weight=max(self.quality_weights, default=base.quality_weight),
            extra_context=max(base.extra_context, self.extra_context[1]),
            system=nominal_system(base.system, *fastest),
        )

    def slowest(self, base: Condition) -> SystemSpec:
        """No system that runs in any window is slower in any part."""
        lowest = self.link_bandwidth[0], self.far_bandwidth[0], self.far_compute[0]
        worst = dict.fromkeys(KINDS, 1.0)
        for disturbance in self.drift:
            worst[disturbance.kind] *= disturbance.factor[0]
        speeds = Speeds(
            base.speeds.gpu * self.hidden.gpu[0] * worst["gpu_throttle"],
            base.speeds.far * self.hidden.far[0] * worst["far_throttle"],
            base.speeds.link * self.hidden.link[0] * worst["link_contention"],
        )
        return slowed(nominal_system(base.actual or base.system, *lowest), speeds)


def find_conditions(conditions: str | Conditions | None) -> Conditions:
    """The conditions behind a name of `CONDITIONS`; ``None`` is ``"fix"``.

    Raises:
        ValueError: there are none of that name.
    """
    if isinstance(conditions, Conditions):
        return conditions
    name = conditions or "fix"
    if name not in CONDITIONS:
        raise ValueError(f"conditions must be one of {list(CONDITIONS)}, got {conditions!r}")
    return CONDITIONS[name]


def _between(span: Range, share: float) -> float:
    return span[0] + share * (span[1] - span[0])


def _log_uniform(rng: np.random.Generator, span: Range) -> float:
    low, high = span
    return float(low * (high / low) ** rng.random())


def _check_factors(name: str, span: Range, most: float = inf) -> None:
    """Raise ``ValueError`` unless ``span`` are two factors, the lower one first."""
    low, high = span
    if not (0 < low <= high <= most and isfinite(high)):
        limit = "" if most == inf else f" <= {most:g}"
        raise ValueError(f"{name} must be two numbers 0 < low <= high{limit}, got {span}")


def _check_counts(name: str, span: Iterable[int], least: int) -> None:
    """Raise ``ValueError`` unless ``span`` are two whole numbers, the lower one first."""
    low, high = span
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, high))
    if not (whole and least <= low <= high):
        raise ValueError(f"{name} must be two whole numbers {least} <= low <= high, got {span}")


_RAND = Conditions(  # assumed where nothing else is said
    batch_sizes=(1, 2, 4, 8, 16),
    hbm_budget=(0.03, 0.2),
    link_bandwidth=(12 / 25, 50 / 25),  # 12 to 50 GB/s around 25: CXL 2.0 of 4 to 16 lanes
    far_bandwidth=(0.25 / 0.512, 1 / 0.512),  # .25 to 1 TB/s around .512
    far_compute=(0.25 / 0.512, 1 / 0.512),  # as wide as the bandwidth
    extra_context=(0, 4096),
    quality_weights=(1.0, 4.0, 16.0),  # those of `ndp_gym.reward.QUALITY_WEIGHTS`
    mix=0.5,  # one or two domains of five come first
)
_DRIFT = (  # chances, onsets, lengths and factors are assumed; speeds fall as far as hidden ones
    Disturbance(kind="gpu_throttle", factor=(0.4, 0.8), ramp=(4, 12)),
    Disturbance(kind="far_throttle", factor=(0.4, 0.8), ramp=(4, 12)),
    Disturbance(kind="link_contention", factor=(0.25, 0.75)),  # one to three others on the link
    Disturbance(kind="co_tenant", factor=(0.25, 0.75)),
)
CONDITIONS = {
    "fix": Conditions(),
    "rand": _RAND,
    # Ranges and chances are assumed.
    "hidden": replace(_RAND, hidden=Hidden(gpu=(0.4, 1.0), far=(0.4, 1.0), link=(0.4, 1.0))),
    "drift": replace(_RAND, drift=_DRIFT, domain_change=0.5),
}
"""Presets by name. ``hidden`` and ``drift`` draw what ``rand`` does too: a policy that is told
nothing of a slow machine has to notice it on machines and requests of every kind."""
