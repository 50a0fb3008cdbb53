"""How well a prediction orders and explains measured losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def ranks(values: ArrayLike) -> FloatArray:
    """Ranks from 0, equal values share their mean rank."""
    array = np.asarray(values, np.float64)
    _, place, count = np.unique(array, return_inverse=True, return_counts=True)
    first = np.cumsum(count) - count
    return np.asarray((first + (count - 1) / 2)[place])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; nan where one of the two is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def within(strata: Sequence[str], a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """Rank correlation in each stratum."""
    names, x, y = np.asarray(strata), np.asarray(a), np.asarray(b)
    return {s: spearman(x[names == s], y[names == s]) for s in dict.fromkeys(strata)}


def fitted_scale(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Factor on ``predicted`` of least squared error."""
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    return float(p @ m / (p @ p))


def explained(predicted: ArrayLike, measured: ArrayLike) -> float:
    """R2: share of the variance of ``measured`` that ``predicted`` explains, no refit."""
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    return 1.0 - float(np.square(m - p).sum() / np.square(m - m.mean()).sum())
