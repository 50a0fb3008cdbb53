"""What a train split says of a model's routing beyond mean loads: `ndp_gym.policy.Patterns`.

What a few decode steps show of a layer is noisy, but experts of all layers go together by subject:
a handful of directions in the space of all experts holds most of what differs between texts, so
that what was seen in one layer says something about the others. And experts keep how much gate
energy they draw per token.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ndp_gym.forecast import shares
from ndp_gym.memory import gate_profile
from ndp_gym.policy import Patterns
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS

__all__ = ["RANK", "patterns_of", "train_patterns"]

FloatArray = NDArray[np.float64]

RANK = 24
"""Directions that are kept."""

HALF_AT = 8
"""The direction that counts half; all constants here: chosen on val of the bundled recording."""

CHUNK = 64
"""Rows that one sample of the loads is counted over."""

_LEAST_SHARE = 1e-4
"""Of a layer's load and energy, added to both where one is divided by the other."""
_KEPT = 0.7
"""Exponent of that ratio: other texts keep less of it."""


@lru_cache(maxsize=8)
def train_patterns(trace: RoutingTrace, model: MoESpec) -> Patterns | None:
    """Patterns of the train split, see `patterns_of`; ``None`` where there are none."""
    train = np.flatnonzero(trace.requests.split == SPLITS.index("train"))
    return patterns_of(trace, model, train)


def patterns_of(
    trace: RoutingTrace, model: MoESpec, requests: NDArray[np.int64]
) -> Patterns | None:
    """Patterns of ``requests``, prompts included.

    Directions are principal components of loads: shares of the tokens of up to `CHUNK` consecutive
    rows, less their mean. One that explains the variance v has the squared length v / (v + w), w
    being that of direction `HALF_AT`, so that projecting on them keeps little of what is mostly
    noise. ``None`` where there are no more samples than directions. Gate weights that were not
    recorded are those that ``model`` is replayed with.
    """
    shape, (profile, _) = (trace.n_layers, trace.n_experts), gate_profile(trace, model)
    loads, total, energy = [], np.zeros(shape), np.zeros(shape)
    for request in requests:
        start, length = int(trace.requests.start[request]), int(trace.requests.length[request])
        for first in range(0, length - CHUNK // 2, CHUNK):
            counts, squares = _counted(trace, profile, start + first, min(CHUNK, length - first))
            loads.append(shares(counts).ravel())
            total, energy = total + counts, energy + squares
    if len(loads) <= RANK:
        return None
    _, spread, found = np.linalg.svd(np.array(loads) - np.mean(loads, axis=0), full_matrices=False)
    variance = spread[:RANK] ** 2
    noise = variance[min(HALF_AT, len(variance) - 1)]
    lengths = np.sqrt(variance / np.maximum(variance + noise, np.finfo(float).tiny))
    return Patterns(
        directions=(lengths[:, None] * found[:RANK]).reshape(-1, *shape),
        intensity=((shares(energy) + _LEAST_SHARE) / (shares(total) + _LEAST_SHARE)) ** _KEPT,
    )


def _counted(
    trace: RoutingTrace, profile: FloatArray, first: int, n_rows: int
) -> tuple[FloatArray, FloatArray]:
    """[L, E] tokens and sums of squared gate weights (else of ``profile`` [K]) of some rows."""
    ids, gates = trace.window(first, n_rows)
    codes = (ids + np.arange(trace.n_layers)[:, None] * trace.n_experts).ravel()
    size, shape = trace.n_layers * trace.n_experts, (trace.n_layers, trace.n_experts)
    counts = np.bincount(codes, minlength=size).reshape(shape).astype(np.float64)
    drawn = np.broadcast_to(profile, ids.shape) if gates is None else gates.astype(np.float64)
    squares = np.bincount(codes, np.square(drawn).ravel(), minlength=size)
    return counts, squares.reshape(shape).astype(np.float64)
