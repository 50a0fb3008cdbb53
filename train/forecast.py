"""Fit how layer agents forecast routing (`ndp_gym.layer_forecast.Learned`) on the train split.

Least squares over replayed windows: what the memories said before a window against the routing of
it. Directions and prior come from four fifths of the train requests and windows from the others,
five times, so that weights are not fitted to directions that have seen the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ndp_gym.directions import directions_of
from ndp_gym.forecast import shares
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.lanes import Lanes
from ndp_gym.layer_forecast import LaneForecaster, features_of
from ndp_gym.plan import FAR
from ndp_gym.rollout import decode_counts
from ndp_gym.trace_requests import SPLITS

FloatArray = NDArray[np.float64]

LIVE = (1, 2, 4, 8, 16)
"""Live requests that a row of weights is for."""

N_FOLDS = 5
N_ORDERS = 4
RIDGE = 0.1
"""Of the mean diagonal of the normal equations (chosen on val of the bundled recording)."""


@lru_cache(maxsize=8)
def fit_weights(
    traces: tuple[str | None, ...], window: int, seed: int = 0, model: str | None = None
) -> FloatArray | None:
    """[5, 5] weights over all recordings together; ``None`` where one has too few to fit on.

    ``model`` is a preset's name, by default the one that each recording names.
    """
    found = []
    for n_live in LIVE:
        normal, right = np.zeros((5, 5)), np.zeros(5)
        for path in traces:
            trace = open_trace(path)
            train = np.flatnonzero(trace.requests.split == SPLITS.index("train"))
            for fold in range(N_FOLDS):
                mine, other = train[fold::N_FOLDS], np.delete(train, np.s_[fold::N_FOLDS])
                directions = directions_of(trace, other)
                if directions is None:
                    return None
                lanes = Lanes(
                    trace,
                    find_model(model, trace),
                    find_system(None),
                    batch_size=n_live,
                    window=window,
                )
                rng = np.random.default_rng([seed, n_live])
                for features, change in samples(
                    lanes, directions, mine, decode_counts(trace, other), rng
                ):
                    normal += features.T @ features
                    right += features.T @ change
        ridge = RIDGE * np.trace(normal) / 5 * np.eye(5)
        found.append(np.linalg.solve(normal + ridge, right))
    weights = np.array(found)
    weights.flags.writeable = False
    return weights


def samples(
    lanes: Lanes,
    directions: FloatArray,
    requests: NDArray[np.int64],
    prior: FloatArray,
    rng: np.random.Generator,
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Of every window: features [L * E, 5], and what its routing is beyond the prior, [L * E]."""
    trace = lanes.trace
    while len(requests) < lanes.batch_size:  # so that all slots are live
        requests = np.concatenate([requests, requests])
    tier = np.full((1, *lanes.shape), FAR, np.uint8)
    bits = np.full(tier.shape, lanes.system.stored_bits[0], np.uint8)
    for _ in range(N_ORDERS):
        forecaster = LaneForecaster(1, lanes.shape, prior)
        lanes.reset(0, rng.permutation(requests[trace.requests.n_decode[requests] > 0]))
        while not lanes.is_done[0]:
            routing = forecaster(lanes.observe())
            counts = lanes.next_counts(0).sum(axis=0).astype(np.float64)
            features = features_of(routing, directions)[0].reshape(-1, 5)
            yield features, (shares(counts) - routing.prior[0]).ravel()
            lanes.advance(tier, bits, np.zeros(tier.shape))
