"""Intervals of means over windows that share conversations, episodes and training seeds.

A conversation occurs in several drawn episodes, and all requests of an episode share its machine.
So both are resampled at once, independently: the pigeonhole bootstrap (Owen 2007,
doi 10.1214/07-AOAS122), which errs on the wide side. A window counts for the conversations that
decode in it, by tokens. Of agents the training seeds are resampled too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ndp_gym.statistics import percentile_interval

FloatArray = NDArray[np.float64]
Values = Sequence[FloatArray]
"""One number per window, [W] for each of M episodes."""


class Resampling:
    """The resamples that all policies of one comparison share.

    Args:
        shares: for each of M episodes [W, C]: which part of a window belongs to a conversation.
        n_resamples: draws.
        seed: of the draws.
    """

    def __init__(
        self, shares: Sequence[FloatArray], n_resamples: int = 2000, seed: int = 0
    ) -> None:
        """Draw; replicate 0 is the sample itself."""
        self.shares = shares
        self.rng = np.random.default_rng(seed)
        self.n_resamples = n_resamples
        self.episodes = self._draw(len(shares))
        self.conversations = self._draw(shares[0].shape[1])
        self._seeds: dict[int, FloatArray] = {}
        self._weight = self._sums([share.sum(axis=0) for share in shares])

    def means(self, values: Values) -> FloatArray:
        """[1 + n_resamples] means over windows of resamples, the sample's first; nan if empty."""
        found = [share.T @ v for share, v in zip(self.shares, values, strict=True)]
        top, weight = self._sums(found), self._weight
        return np.divide(top, weight, out=np.full_like(top, np.nan), where=weight > 0)

    def means_over_seeds(self, runs: Sequence[Values]) -> FloatArray:
        """The same for an agent with a run per training seed, seeds resampled."""
        of_seed = np.array([self.means(values) for values in runs])
        if len(runs) not in self._seeds:
            self._seeds[len(runs)] = self._draw(len(runs))
        return np.asarray((self._seeds[len(runs)].T * of_seed).mean(axis=0))

    def _sums(self, per_episode: Sequence[FloatArray]) -> FloatArray:
        by_conversation = self.episodes @ np.array(per_episode)
        return np.asarray((by_conversation * self.conversations).sum(axis=1))

    def _draw(self, n: int) -> FloatArray:
        """How often each of ``n`` is in every resample, [1 + n_resamples, n]."""
        drawn = self.rng.multinomial(n, np.full(n, 1 / n), size=self.n_resamples)
        return np.concatenate([np.ones((1, n)), drawn])


def interval(replicates: FloatArray) -> tuple[float, float]:
    """The central 95 % of the resamples."""
    return percentile_interval(replicates[1:])


def frontier(x: FloatArray, curve_x: FloatArray, curve_y: FloatArray) -> FloatArray:
    """The largest y where x is ``x`` on the curve's concave hull, nan outside its range of x.

    What alternating between two points of the curve, window by window, would reach on average.
    Replicate by replicate: ``x`` is [R]; ``curve_x`` and ``curve_y`` [K, R] are points.
    """
    best = np.full_like(x, -np.inf)
    for left_x, left_y in zip(curve_x, curve_y, strict=True):
        for right_x, right_y in zip(curve_x, curve_y, strict=True):
            span = right_x - left_x
            share = np.divide(x - left_x, span, out=np.zeros_like(x), where=span > 0)
            inside = (left_x <= x) & (x <= right_x)
            y = left_y + share * (right_y - left_y)
            best = np.where(inside, np.maximum(best, y), best)
    return np.where(np.isfinite(best), best, np.nan)
