"""Predictors of stated accuracy: what a published recall, precision or horizon is worth here.

A prefetcher of the literature is compared at the accuracy its authors report, or at a better one,
instead of with a network that would have to be trained for each recording.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.specs import Prefetch


def accuracy_at(distance: int, near: float, floor: float, decay: float) -> float:
    """Accuracy ``distance`` >= 1 layers ahead: ``near`` one layer ahead, falling to ``floor``."""
    return floor + (near - floor) * math.exp(-decay * (distance - 1))


def prefetch_at(depth: int, accuracy: float) -> Prefetch:
    """A prefetch that predicts as many experts as are needed, so recall equals precision."""
    return Prefetch(depth=depth, recall=accuracy, precision=max(accuracy, 1e-6))


def degraded(
    counts: ArrayLike, recall: float, precision: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """True ``counts`` [L, E] as a predictor of that accuracy tells them.

    Every expert that will be used is foreseen with chance ``recall``. Beside those, unused experts
    are named until ``precision`` is met on average, each with the count of a foreseen one of its
    layer.

    Args:
        counts: tokens per expert of the window to come, from an oracle.
        recall: share of the used experts that are foreseen.
        precision: share of the named experts that are used.
        rng: the policy's own generator.
    """
    truth = np.asarray(counts, dtype=np.float64)
    used = truth > 0
    foreseen = used & (rng.random(truth.shape) < recall)
    n_unused = np.maximum((~used).sum(axis=1, keepdims=True), 1)
    n_wrong = foreseen.sum(axis=1, keepdims=True) * (1 / precision - 1)
    invented = ~used & (rng.random(truth.shape) < n_wrong / n_unused)
    told = np.where(foreseen, truth, 0.0)
    for layer in np.flatnonzero(invented.any(axis=1)):
        pool = truth[layer, foreseen[layer]]
        told[layer, invented[layer]] = rng.choice(pool, int(invented[layer].sum()))
    return told
