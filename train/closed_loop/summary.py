"""Verdicts on both parts: which predictions hold, and from how many bits on replay holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.closed_loop import agreement
from train.closed_loop.bitmaps import FloatArray, Measured
from train.closed_loop.closed import Loop

WITHIN, OVERALL, EXPLAINED = 0.7, 0.95, 0.9
"""Targets: Spearman within a stratum and overall, R2 with one scale fitted on other maps."""
TOLERANCE = 0.02
"""Error of tokens per second (relative) and hit rate (absolute) below which replay holds."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one way to predict does.

    Attributes:
        way: its name.
        scale: factor on its prediction that fits all maps best.
        overall: Spearman over all maps.
        strata: Spearman at equal mean bits.
        explained: R2 on each half of the maps with the scale of the other half, the worse one.
        factor: typical factor between scaled prediction and measurement (standard deviation of
            the log ratio), over maps that lose more than their standard error.
    """

    way: str
    scale: float
    overall: float
    strata: Mapping[str, float]
    explained: float
    factor: float

    @property
    def passes(self) -> tuple[bool, bool, bool]:
        """Whether the targets within strata, overall, and of R2 are met."""
        least = min(self.strata.values())
        return least >= WITHIN, self.overall >= OVERALL, self.explained >= EXPLAINED


def verdicts(measured: Measured) -> list[Verdict]:
    """One per way to predict."""
    names = [m.stratum for m in measured.maps]
    equal = np.array([name.startswith("mean") for name in names])
    half = _half(len(names))
    found = []
    for way, predicted in measured.predicted.items():
        scale = agreement.fitted_scale(predicted, measured.nats)
        found.append(
            Verdict(
                way=way,
                scale=scale,
                overall=agreement.spearman(predicted, measured.nats),
                strata=agreement.within(
                    [n for n, is_equal in zip(names, equal, strict=True) if is_equal],
                    predicted[equal],
                    measured.nats[equal],
                ),
                explained=min(_explained(predicted, measured.nats, part) for part in (half, ~half)),
                factor=_factor(predicted * scale, measured),
            )
        )
    return found


def _explained(predicted: FloatArray, nats: FloatArray, fitted: FloatArray) -> float:
    scale = agreement.fitted_scale(predicted[fitted], nats[fitted])
    return agreement.explained(predicted[~fitted] * scale, nats[~fitted])


def with_square(predicted: FloatArray, measured: Measured) -> tuple[FloatArray, float]:
    """Coefficients of D = a T + b T^2 for all maps, and the worse R2 of halves as in `Verdict`."""
    half = _half(len(predicted))
    powers = np.stack([predicted, predicted**2], axis=1)

    def fit(part: NDArray[np.bool_]) -> FloatArray:
        found: FloatArray = np.linalg.lstsq(powers[part], measured.nats[part])[0]
        return found

    worse = min(
        agreement.explained(powers[~part] @ fit(part), measured.nats[~part])
        for part in (half, ~half)
    )
    return fit(np.ones(len(half), np.bool_)), worse


def _half(n: int) -> NDArray[np.bool_]:
    return np.random.default_rng(0).permutation(n) % 2 == 0


def _factor(predicted: FloatArray, measured: Measured) -> float:
    clear = (measured.nats > measured.errors) & (predicted > 0)
    return float(np.exp(np.log(predicted[clear] / measured.nats[clear]).std()))


def is_close(row: Loop) -> bool:
    """Whether replaying the recording tells this policy's speed and hits.

    On recorded answers and on its own; the latter are another sample of text, so their speed may
    differ by what as few requests differ by chance.
    """
    speeds = (row.speed_error, row.speed_interval), (row.free_speed_error, row.free_interval)
    return all(abs(error) <= max(TOLERANCE, allowed) for error, allowed in speeds) and all(
        abs(error) <= TOLERANCE for error in (row.hit_error, row.free_hit_error)
    )


def threshold(loops: Sequence[Loop]) -> float:
    """Mean bits at and below which replay is not trusted: the highest that fails."""
    return max((row.mean_bits for row in loops if not is_close(row)), default=0.0)


def lowest_trusted(loops: Sequence[Loop]) -> Loop:
    """The row of fewest bits above `threshold` that uses both tiers, so that hits can differ."""
    trusted = [row for row in loops if row.mean_bits > threshold(loops)]
    return min((row for row in trusted if 0 < row.open.hit_rate < 1), key=lambda row: row.mean_bits)
