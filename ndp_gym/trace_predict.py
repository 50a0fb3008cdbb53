"""How well one layer's experts predict the next layer's, by co-occurrence."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Spans = Sequence[tuple[int, int]]


def next_layer_recall(
    expert_ids: npt.NDArray[np.integer], spans: Spans, n_experts: int
) -> tuple[float | None, float | None]:
    """Recall@K of the next layer's experts: from this layer's experts, and from popularity alone.

    The first half of every span learns ``P(next | this)``, smoothed by one pseudo-count of the
    popularity; in the second half the K experts with the largest sum of it are predicted. Mean over
    layers. None where there is one layer only or no row to learn from.
    """
    halves = [(first, (first + last) // 2, last) for first, last in spans]
    learn = np.concatenate([np.arange(first, middle) for first, middle, _ in halves])
    test = np.concatenate([np.arange(middle, last) for _, middle, last in halves])
    if expert_ids.shape[1] < 2 or not len(learn):
        return None, None
    recalls = [
        _layer_recall(
            _member(expert_ids[:, layer], learn, n_experts),
            _member(expert_ids[:, layer + 1], learn, n_experts),
            _member(expert_ids[:, layer], test, n_experts),
            _member(expert_ids[:, layer + 1], test, n_experts),
            expert_ids.shape[2],
        )
        for layer in range(expert_ids.shape[1] - 1)
    ]
    means = np.mean(recalls, axis=0)
    return float(means[0]), float(means[1])


def _member(
    ids: npt.NDArray[np.integer], rows: npt.NDArray[np.int64], n_experts: int
) -> npt.NDArray[np.float32]:
    hot = np.zeros((len(rows), n_experts), dtype=np.float32)
    np.put_along_axis(hot, ids[rows].astype(np.int64), 1.0, axis=1)
    return hot


def _layer_recall(
    this: npt.NDArray[np.float32],
    following: npt.NDArray[np.float32],
    this_test: npt.NDArray[np.float32],
    following_test: npt.NDArray[np.float32],
    top_k: int,
) -> tuple[float, float]:
    popularity = following.mean(axis=0)
    given = (this.T @ following + popularity) / (this.sum(axis=0)[:, None] + 1.0)
    best = np.argsort(-(this_test @ given), axis=1, kind="stable")[:, :top_k]
    popular = np.argsort(-popularity, kind="stable")[:top_k]
    informed = float(np.take_along_axis(following_test, best, axis=1).mean())
    return informed, float(following_test[:, popular].mean())
