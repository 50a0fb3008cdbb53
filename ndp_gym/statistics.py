"""Point estimates and intervals: bootstrap of blocks of conversations, paired, and the IQM.

Windows of one conversation are not independent, so every interval resamples whole conversations.
Nor are conversations that decode in one batch: they share each window's seconds. So what is drawn
are blocks of B (the batch size) neighbours in order of first admission; at B = 1 that is the plain
cluster bootstrap. All policies of a comparison share the same resamples (paired), because they
replay the same requests. This module knows arrays only: no trace, no policy, no report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ConversationBootstrap",
    "interquartile_mean",
    "interquartile_mean_interval",
    "percentile_interval",
    "probability_of_improvement",
]

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ConversationBootstrap:
    """The resamples of conversations that every policy of one comparison shares.

    Cluster bootstrap with percentile intervals (Davison & Hinkley 1997, §3.8): blocks of
    ``block_size`` neighbouring conversations are drawn with replacement, the last block may be
    smaller. With few blocks such intervals are somewhat too narrow.

    Attributes:
        n_conversations: in the sample, in order of first admission.
        block_size: conversations that decoded together; 1 draws them one by one.
        n_resamples: draws of as many blocks as there are.
        seed: of the draws.
    """

    n_conversations: int
    block_size: int = 1
    n_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where no resample can be drawn."""
        if self.n_conversations < 1:
            raise ValueError(f"n_conversations must be at least 1, got {self.n_conversations}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {self.n_resamples}")

    @property
    def n_blocks(self) -> int:
        """Blocks that are drawn from."""
        return -(-self.n_conversations // self.block_size)

    def weights(self) -> NDArray[np.float64]:
        """How often each block occurs in each resample: ``[n_resamples, n_blocks]``."""
        rng = np.random.default_rng(self.seed)
        n = self.n_blocks
        drawn = rng.integers(0, n, size=(self.n_resamples, n))
        flat = (drawn + n * np.arange(self.n_resamples)[:, None]).ravel()
        counts = np.bincount(flat, minlength=n * self.n_resamples)
        return counts.reshape(self.n_resamples, n).astype(np.float64)

    def ratios(self, numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.float64]:
        """Replicates ``[n_resamples]`` of sum(numerator) / sum(denominator) over conversations.

        A ratio of sums, not a mean of ratios, so that long conversations weigh what they cost
        (tokens / seconds). Resamples whose denominator is zero are nan.

        Args:
            numerator: per conversation ``[C]``.
            denominator: per conversation ``[C]``, not negative.
        """
        weights = self.weights()
        top = weights @ self._block_sums("numerator", numerator)
        bottom = weights @ self._block_sums("denominator", denominator)
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)

    def _block_sums(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.n_conversations,):
            raise ValueError(
                f"{name} must have one value per conversation, shape ({self.n_conversations},), "
                f"got {array.shape}"
            )
        starts = np.arange(0, self.n_conversations, self.block_size)
        return np.asarray(np.add.reduceat(array, starts))


def percentile_interval(replicates: ArrayLike, *, level: float = 0.95) -> Interval:
    """The central ``level`` share of ``replicates`` as (low, high); nan replicates are left out.

    Raises:
        ValueError: if ``level`` is not in (0, 1) or no finite replicate is left.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}")
    values = np.asarray(replicates, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if values.size == 0:
        raise ValueError("an interval needs at least one finite replicate, got none")
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all ``scores`` (any shape).

    Sort, drop ``floor(n / 4)`` values on each side, average (Agarwal et al. 2021,
    arXiv:2108.13264).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    if values.size == 0:
        raise ValueError("interquartile_mean needs at least one score, got none")
    cut = values.size // 4
    return float(values[cut : values.size - cut].mean())


def interquartile_mean_interval(
    scores: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the IQM by the stratified bootstrap: runs are resampled inside each task.

    Args:
        scores: ``[runs, tasks]``; for learned agents runs are training seeds (5 at least).
        level: coverage.
        n_resamples: bootstrap resamples.
        seed: of the resampling.
    """
    matrix = _runs_by_tasks("scores", scores)
    n_runs, n_tasks = matrix.shape
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n_runs, size=(n_resamples, n_runs, n_tasks))
    resampled = np.sort(matrix[drawn, np.arange(n_tasks)].reshape(n_resamples, -1), axis=1)
    cut = matrix.size // 4
    return percentile_interval(resampled[:, cut : matrix.size - cut].mean(axis=1), level=level)


def probability_of_improvement(scores_a: ArrayLike, scores_b: ArrayLike) -> float:
    """P(a run of A beats a run of B on the same task), ties one half, averaged over tasks.

    Args:
        scores_a: ``[runs, tasks]``, higher is better.
        scores_b: ``[other runs, tasks]``.
    """
    a, b = _runs_by_tasks("scores_a", scores_a), _runs_by_tasks("scores_b", scores_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"both score matrices need the same tasks, got {a.shape[1]} and {b.shape[1]}"
        )
    difference = a[:, None, :] - b[None, :, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def _runs_by_tasks(name: str, scores: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(
            f"{name} must be a non-empty [runs, tasks] matrix, got shape {matrix.shape}"
        )
    return matrix
