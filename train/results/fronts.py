"""Throughput at equal loss: a heuristic's own trade of seconds against quality as the yardstick.

A tuned heuristic is run at several prices of a second, which gives its curve of throughput over
ΔNLL; an agent is compared with the curve at the agent's own ΔNLL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.results.measure import Run
from train.results.resampling import FloatArray, Resampling, at_equal, interval

PRICES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Times the tuned price of a second."""


class Curve(NamedTuple):
    """Mean loss and mean log throughput of every resample, [K, R] each."""

    loss: FloatArray
    speed: FloatArray


def curve_of(runs: Sequence[Run], resampling: Resampling) -> Curve:
    """From runs at several prices."""
    return Curve(
        np.array([resampling.means(run.loss) for run in runs]),
        np.array([resampling.means(run.speed) for run in runs]),
    )


class Gain(NamedTuple):
    """A difference and its 95 % interval; nan where it could not be compared."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, replicates: FloatArray) -> Gain:
        """From the replicates of a difference."""
        if not np.isfinite(replicates[0]) or np.isfinite(replicates).mean() < 0.975:
            return cls(np.nan, np.nan, np.nan)
        return cls(float(replicates[0]), *interval(replicates))


BUDGETS = (0.05, 0.1, 0.2)
"""Nats over the reference at which throughputs are compared."""

_RANGE = 41  # losses at which curves are compared for the mean


def curve_over_seeds(by_price: Sequence[Sequence[Run]], resampling: Resampling) -> Curve:
    """Of an agent: at every price a run per training seed."""
    over = resampling.means_over_seeds
    return Curve(
        np.array([over([run.loss for run in runs]) for runs in by_price]),
        np.array([over([run.speed for run in runs]) for runs in by_price]),
    )


def gains_at_budgets(mine: Curve, theirs: Curve) -> list[Gain]:
    """Relative throughput of one curve over the other at every one of `BUDGETS`."""
    n = mine.loss.shape[1]
    return [Gain.of(_ratio(mine, theirs, np.full(n, budget))) for budget in BUDGETS]


def gain_over_range(mine: Curve, theirs: Curve) -> Gain:
    """Relative throughput, geometric mean over all losses that both curves reach.

    The difference of their hypervolumes over those losses, log throughput being the other axis.
    """
    low = np.maximum(mine.loss.min(axis=0), theirs.loss.min(axis=0))
    high = np.minimum(mine.loss.max(axis=0), theirs.loss.max(axis=0))
    places = (low + share * (high - low) for share in np.linspace(0, 1, _RANGE))
    return Gain.of(np.mean([_ratio(mine, theirs, place) for place in places], axis=0))


def _ratio(mine: Curve, theirs: Curve, loss: FloatArray) -> FloatArray:
    one, other = (at_equal(loss, curve.loss, curve.speed) for curve in (mine, theirs))
    return np.asarray(np.expm1(one - other))


def gain_at_equal_loss(loss: FloatArray, speed: FloatArray, curve: Curve) -> Gain:
    """Relative throughput over the curve at the same loss, [R] replicates in, 0.01 = 1 %."""
    return Gain.of(np.expm1(speed - at_equal(loss, curve.loss, curve.speed)))
