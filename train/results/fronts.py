"""Throughput at equal loss: a heuristic's own trade of seconds against quality as the yardstick.

A tuned heuristic is run at many prices of a second, which gives its curve of throughput over ΔNLL;
others are compared with the concave hull of that curve at their own ΔNLL. The prices are so close
that the heuristic itself at another price is on the hull.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.results.measure import Run
from train.results.resampling import FloatArray, Resampling, frontier, interval

PRICES = tuple(2.0 ** (k / 12) for k in range(-18, 19) if k % 2 == 0 or abs(k) < 6)
"""Times the tuned price of a second: of the heuristic that others are compared with."""

AGENT_PRICES = tuple(2.0 ** (k / 2) for k in range(-3, 4))
"""Of agents, which take longer: fewer points, so that their hull errs to their disadvantage."""


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
    return [Gain.of(np.expm1(_apart(mine, theirs, np.full(n, budget)))) for budget in BUDGETS]


def gain_over_range(mine: Curve, theirs: Curve) -> Gain:
    """Relative throughput, geometric mean over all losses that both curves reach.

    The difference of their hypervolumes over those losses, log throughput being the other axis.
    """
    low = np.maximum(mine.loss.min(axis=0), theirs.loss.min(axis=0))
    high = np.minimum(mine.loss.max(axis=0), theirs.loss.max(axis=0))
    places = (np.minimum(low + share * (high - low), high) for share in np.linspace(0, 1, _RANGE))
    apart = np.array([_apart(mine, theirs, place) for place in places])
    return Gain.of(np.expm1(np.trapezoid(apart, axis=0) / (_RANGE - 1)))


def gain_at_equal_loss(loss: FloatArray, speed: FloatArray, curve: Curve) -> Gain:
    """Relative throughput over the curve at the same loss, [R] replicates in, 0.01 = 1 %."""
    return Gain.of(np.expm1(speed - frontier(loss, curve.loss, curve.speed)))


def _apart(mine: Curve, theirs: Curve, loss: FloatArray) -> FloatArray:
    """[R] log throughput of one curve over the other's."""
    one, other = (frontier(loss, curve.loss, curve.speed) for curve in (mine, theirs))
    return np.asarray(one - other)
