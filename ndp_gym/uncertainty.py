"""How sure an order of policies is: constants with documented ranges, sampled together.

Every sample is a system (and kappa) of its own. Policies are told the sampled system, so this asks
what holds whichever machine the constants describe, not what a policy loses by being told the
wrong ones. Which constant flips an order is found by moving one at a time to the ends of its range.
The ranges and their sources are data: ``presets/uncertainty.toml``.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ndp_gym.quality import QualityModel
from ndp_gym.specs import SystemSpec
from ndp_gym.specs.devices import MoEKernel

__all__ = [
    "PLANS",
    "Constant",
    "Flip",
    "Pair",
    "Score",
    "Study",
    "applied",
    "constants_of",
    "study",
]

LOW_WIDTH = 4  # bits up to which weights carry group scales and have kernels of their own
PLANS = "policies plan with the sampled constants"


class Score(NamedTuple):
    """What a policy reached under one sample."""

    reward: float
    tokens_per_s: float


Scores = Mapping[str, Score]
"""By policy; one that is infeasible under the sample is missing."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One uncertain constant of a system, with the ends of its range.

    Attributes:
        name: e.g. ``far_efficiency``, or ``kernel_efficiency_4`` for one width.
        symbol: as in the equations of ``docs/model.md``.
        kind: ``factor`` multiplies the nominal value, ``added`` is added, ``value`` replaces it.
        scale: ``log`` or ``linear``.
        low, high: in units of ``kind``.
        source: where the range comes from.
    """

    name: str
    symbol: str
    kind: str
    scale: str
    low: float
    high: float
    source: str

    def at(self, share: float) -> float:
        """The value at ``share`` in [0, 1] of the range, on its scale."""
        if self.scale == "log":
            return float(self.low * (self.high / self.low) ** share)
        return float(self.low + share * (self.high - self.low))


class Flip(TypedDict):
    """A constant at one end of its range, where the order of a pair is the other way round.

    ``reward_difference`` is ``None`` where one of the two is infeasible.
    """

    constant: str
    value: float
    kind: str
    reward_difference: float | None


class Pair(TypedDict):
    """How sure the order of two policies is; ``a`` has the higher reward at nominal constants.

    Ties count one half. ``strongest`` is the constant whose rank correlation with the difference
    in reward is largest over the samples.
    """

    a: str
    b: str
    reward_difference: float | None
    p_a_beats_b: float
    p_a_faster: float
    flips: bool
    flipped_by: list[Flip]
    strongest: str | None
    rank_correlation: float | None


class Study(TypedDict):
    """What was sampled under one condition, and what it says about each pair of policies."""

    trace: str
    model: str
    system: str
    batch_size: int
    window: int
    n_samples: int
    seed: int
    plans: str
    constants: list[dict[str, Any]]
    pairs: list[Pair]


@functools.cache
def _rows() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("ndp_gym.presets").joinpath("uncertainty.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))


def constants_of(system: SystemSpec) -> list[Constant]:
    """The uncertain constants that mean something on ``system``."""
    found = []
    if system.far.can_compute:
        found.append(_constant("far_efficiency"))
        has_floor = system.far.floor_s > 0
        row = "far_floor" if has_floor else "far_floor_unknown"
        found.append(_constant(row, name="far_floor"))
    states_width = system.format.name in _rows()["format_overhead"]["stated"]
    if not states_width and system.stored_bits[-1] <= LOW_WIDTH:
        found.append(_constant("format_overhead"))
    link = _constant("link_bandwidth")
    if system.link.name.endswith("_raw"):
        share = _rows()["link_bandwidth"]["raw_share"]
        link = replace(link, low=share * link.low, high=share * link.high)
    found.append(link)
    for bits in system.stored_bits:
        row = f"kernel_efficiency_{bits}"
        known = row if row in _rows() else "kernel_efficiency_low"
        found.append(_constant(known, name=row, symbol=f"eta_w({bits})"))
    if system.engine_token_s > 0:
        found.append(_constant("engine_token"))
    return [*found, _constant("kappa")]


def _constant(row: str, **changes: str) -> Constant:
    fields = ("symbol", "kind", "scale", "low", "high", "source")
    return Constant(**{"name": row, **{f: _rows()[row][f] for f in fields}, **changes})


def applied(
    values: Mapping[str, float], system: SystemSpec, quality: QualityModel
) -> tuple[SystemSpec, QualityModel]:
    """``system`` and ``quality`` with some constants changed, by name, in units of their kind.

    Efficiencies stay at most 1. The far memory grows with the format, so that capacity, which is
    known, decides nothing.
    """
    far, link, fmt, gpu = system.far, system.link, system.format, system.gpu
    floor = values.get("far_floor")
    if floor is not None:
        far = replace(far, floor_s=floor * far.floor_s if far.floor_s > 0 else floor)
    efficiency = min(1.0, far.efficiency * values.get("far_efficiency", 1.0))
    far = replace(far, efficiency=efficiency)
    rate = link.bandwidth_bytes_per_s * values.get("link_bandwidth", 1.0)
    extra = values.get("format_overhead", 0.0)
    stored = {b: w + extra * (b <= LOW_WIDTH) for b, w in fmt.bits_per_weight.items()}
    if extra > 0:
        far = replace(far, memory_bytes=2 * far.memory_bytes)
    kernels, kernel_of = dict(gpu.moe_kernels), dict(fmt.kernel)
    for bits in system.stored_bits:
        launch_s, share = gpu.moe_kernels[fmt.kernel[bits]]
        share = min(1.0, share * values.get(f"kernel_efficiency_{bits}", 1.0))
        kernel_of[bits] = f"{fmt.kernel[bits]}@{bits}"
        kernels[kernel_of[bits]] = MoEKernel(launch_s, share)
    sampled = replace(
        system,
        far=far,
        link=replace(link, bandwidth_bytes_per_s=rate),
        format=replace(fmt, bits_per_weight=stored, kernel=kernel_of),
        gpu=replace(gpu, moe_kernels=kernels),
        engine_token_s=system.engine_token_s * values.get("engine_token", 1.0),
    )
    return sampled, replace(quality, kappa=values.get("kappa", quality.kappa))


Evaluate = Callable[[Mapping[str, float]], Scores]
"""Scores of all policies under the given values of constants; ``{}`` is nominal."""


def study(
    constants: Sequence[Constant],
    evaluate: Evaluate,
    *,
    n_samples: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """How sure the order of every pair of policies is that `evaluate` scores at nominal constants.

    Samples form a Latin hypercube: each constant is spread evenly over its range (log-uniformly on
    a ``log`` scale), independently of the others. Then every constant alone goes to both ends.

    Raises:
        ValueError: ``n_samples`` < 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be >= 1, got {n_samples}")
    shares = _hypercube(n_samples, len(constants), seed)
    points = [{c.name: c.at(u) for c, u in zip(constants, row, strict=True)} for row in shares]
    ends = [(c, c.at(share)) for c in constants for share in (0.0, 1.0)]
    asked = [{}, *points, *({c.name: value} for c, value in ends)]
    scores = []
    for i, values in enumerate(asked):
        scores.append(evaluate(values))
        if progress is not None:
            progress(i + 1, len(asked))
    nominal, sampled, moved = scores[0], scores[1 : n_samples + 1], scores[n_samples + 1 :]
    order = sorted(nominal, key=lambda name: -nominal[name].reward)
    return [
        _pair(a, b, nominal, sampled, list(zip(ends, moved, strict=True)), constants, shares)
        for a, b in combinations(order, 2)
    ]


def _hypercube(n_samples: int, n_constants: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    strata = np.array([rng.permutation(n_samples) for _ in range(n_constants)]).T
    return (strata + rng.random((n_samples, n_constants))) / n_samples


def _pair(
    a: str,
    b: str,
    nominal: Scores,
    sampled: Sequence[Scores],
    moved: Sequence[tuple[tuple[Constant, float], Scores]],
    constants: Sequence[Constant],
    shares: NDArray[np.float64],
) -> Pair:
    by_reward = np.array([_difference(scores, a, b, "reward") for scores in sampled])
    by_speed = np.array([_difference(scores, a, b, "tokens_per_s") for scores in sampled])
    base = _difference(nominal, a, b, "reward")
    flipped_by = []
    for (constant, value), scores in moved:
        difference = _difference(scores, a, b, "reward")
        if difference < 0 < base:
            end = Flip(
                constant=constant.name,
                value=value,
                kind=constant.kind,
                reward_difference=_finite(difference),
            )
            flipped_by.append(end)
    strongest, correlation = _strongest(constants, shares, by_reward)
    return Pair(
        a=a,
        b=b,
        reward_difference=_finite(base),
        p_a_beats_b=_probability(by_reward),
        p_a_faster=_probability(by_speed),
        flips=bool(flipped_by) or (base > 0 and bool((by_reward < 0).any())),
        flipped_by=flipped_by,
        strongest=strongest,
        rank_correlation=correlation,
    )


def _difference(scores: Scores, a: str, b: str, field: str) -> float:
    """Score of ``a`` minus that of ``b``; what is infeasible loses by infinity."""
    if a in scores and b in scores:
        return float(getattr(scores[a], field) - getattr(scores[b], field))
    return np.inf * ((a in scores) - (b in scores)) if (a in scores) != (b in scores) else 0.0


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _probability(differences: NDArray[np.float64]) -> float:
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def _strongest(
    constants: Sequence[Constant], shares: NDArray[np.float64], differences: NDArray[np.float64]
) -> tuple[str | None, float | None]:
    """The constant that the difference follows most, and Spearman's rank correlation with it."""
    if len(differences) < 3 or not np.ptp(np.nan_to_num(differences)):
        return None, None
    ranks = np.stack([_ranks(column) for column in (differences, *shares.T)])
    correlations: NDArray[np.float64] = np.asarray(np.corrcoef(ranks))[0, 1:]
    best = int(np.argmax(np.abs(correlations)))
    return constants[best].name, float(correlations[best])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks, equal values sharing the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]
