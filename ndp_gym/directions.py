"""In which directions a model's routing varies: principal components of loads on the train split.

What a few decode steps show of a layer is noisy, but experts of all layers go together by subject.
A handful of directions in the space of all experts holds most of what differs between texts, so
that what was seen in one layer says something about the others.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ndp_gym.forecast import shares
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS

__all__ = ["RANK", "directions_of", "train_directions"]

FloatArray = NDArray[np.float64]

RANK = 24
"""Directions that are kept."""

HALF_AT = 8
"""The direction that counts half; all constants here: chosen on val of the bundled recording."""

CHUNK = 64
"""Rows that one sample of the loads is counted over."""


@lru_cache(maxsize=8)
def train_directions(trace: RoutingTrace) -> FloatArray | None:
    """Directions of the train split, see `directions_of`; ``None`` where there is none."""
    return directions_of(trace, np.flatnonzero(trace.requests.split == SPLITS.index("train")))


def directions_of(trace: RoutingTrace, requests: NDArray[np.int64]) -> FloatArray | None:
    """[R, L, E] orthogonal directions of the loads of ``requests``, prompts included.

    Samples are shares of the tokens of up to `CHUNK` consecutive rows, less their mean. A direction
    that explains the variance v has the squared length v / (v + w), w being that of direction
    `HALF_AT`, so that projecting on them keeps little of what is mostly noise. ``None`` where there
    are no more samples than directions.
    """
    shape = (trace.n_layers, trace.n_experts)
    offsets = (np.arange(shape[0]) * shape[1])[:, None]
    samples = []
    for request in requests:
        start, length = int(trace.requests.start[request]), int(trace.requests.length[request])
        for first in range(0, length - CHUNK // 2, CHUNK):
            ids, _ = trace.window(start + first, min(CHUNK, length - first))
            codes = (ids.astype(np.int64) + offsets).ravel()
            counts = np.bincount(codes, minlength=shape[0] * shape[1]).reshape(shape)
            samples.append(shares(counts.astype(np.float64)).ravel())
    if len(samples) <= RANK:
        return None
    loads = np.array(samples)
    _, spread, found = np.linalg.svd(loads - loads.mean(axis=0), full_matrices=False)
    variance = spread[:RANK] ** 2
    lengths = np.sqrt(variance / (variance + variance[HALF_AT]))
    directions: FloatArray = (lengths[:, None] * found[:RANK]).reshape(-1, *shape)
    return directions
