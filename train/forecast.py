"""Fit how layer agents forecast routing (`ndp_gym.layer_forecast.Learned`) on the train split.

Least squares over replayed windows: what the memories said before a window against the routing of
it. Directions and prior come from four fifths of the train requests and windows from the others,
five times, so that weights are not fitted to directions that have seen the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.forecast import shares
from ndp_gym.inputs import ModelLike, SystemLike, find_model, find_system, open_trace
from ndp_gym.lanes import Lanes
from ndp_gym.layer_forecast import LaneForecaster, features_of
from ndp_gym.patterns import patterns_of
from ndp_gym.plan import FAR
from ndp_gym.policy import Patterns
from ndp_gym.rollout import decode_counts
from ndp_gym.trace_requests import SPLITS, Requests

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LIVE = (1, 2, 4, 8, 16)
"""Live requests that a row of weights is for."""

N_FOLDS = 5
N_ORDERS = 4
RIDGE = 0.1
"""Of the mean diagonal of the normal equations (chosen on val of the bundled recording)."""


class Sample(NamedTuple):
    """What was known of a window and what came, [L * E] each beyond what the prior says.

    Attributes:
        features: [L * E, 5].
        change: of the shares of the load.
        gates: of averaged gate energy, the prior being that of the load times its intensity.
        energy: of the window's gate energy, likewise.
        intensity: [L * E] of the experts.
    """

    features: FloatArray
    change: FloatArray
    gates: FloatArray
    energy: FloatArray
    intensity: FloatArray


@lru_cache(maxsize=8)
def fit_weights(
    traces: tuple[str | None, ...],
    window: int,
    seed: int = 0,
    model: ModelLike = None,
    system: SystemLike = None,
) -> FloatArray | None:
    """[5, 6] weights over all recordings together; ``None`` where one has too few to fit on.

    ``model`` is by default the preset that each recording names; it has to fit on ``system``.
    """
    found = []
    for n_live in LIVE:
        sums = Sums()
        for path in traces:
            trace = open_trace(path)
            spec = find_model(model, trace)
            for mine, other in folds(trace.requests):
                patterns = patterns_of(trace, spec, other)
                if patterns is None:
                    return None
                lanes = Lanes(
                    trace,
                    spec,
                    find_system(system),
                    batch_size=n_live,
                    window=window,
                )
                rng = np.random.default_rng([seed, n_live])
                for sample in samples(lanes, patterns, mine, decode_counts(trace, other), rng):
                    sums.add(sample)
        found.append(sums.weights())
    weights = np.array(found)
    weights.flags.writeable = False
    return weights


def folds(requests: Requests) -> Iterator[tuple[IntArray, IntArray]]:
    """A fold of the train requests and all others, fold by fold.

    Conversations are dealt to the folds in turn, so that none has turns in two of them.
    """
    train = np.flatnonzero(requests.split == SPLITS.index("train"))
    _, first, which = np.unique(
        requests.conversation[train], return_index=True, return_inverse=True
    )
    number = np.argsort(np.argsort(first))[which]  # of its conversation, by first appearance
    for fold in range(min(N_FOLDS, len(first))):
        is_mine = number % N_FOLDS == fold
        yield train[is_mine], train[~is_mine]


class Sums:
    """Normal equations of loads, and of gate energy once the loads are fitted."""

    def __init__(self) -> None:
        """Nothing added."""
        self._normal, self._right = np.zeros((5, 5)), np.zeros(5)
        # Products of [drawn by features (5), gates, energy]: all that the second fit needs.
        self._energy = np.zeros((7, 7))

    def add(self, sample: Sample) -> None:
        """Add one window."""
        self._normal += sample.features.T @ sample.features
        self._right += sample.features.T @ sample.change
        drawn = sample.features * sample.intensity[:, None]
        columns = np.column_stack([drawn, sample.gates, sample.energy])
        self._energy += columns.T @ columns

    def weights(self) -> FloatArray:
        """[6] of loads by ridge regression, then that of averaged gate energy, in 0..1."""
        ridge = RIDGE * np.trace(self._normal) / 5 * np.eye(5)
        loads = np.linalg.solve(self._normal + ridge, self._right)
        beyond_gates, beyond_energy = np.append(-loads, [1, 0]), np.append(-loads, [0, 1])
        scale = beyond_gates @ self._energy @ beyond_gates
        weight = beyond_gates @ self._energy @ beyond_energy / max(scale, 1e-300)
        return np.append(loads, np.clip(weight, 0, 1))


def samples(
    lanes: Lanes,
    patterns: Patterns,
    requests: NDArray[np.int64],
    prior: FloatArray,
    rng: np.random.Generator,
) -> Iterator[Sample]:
    """Every window of ``requests``, in several orders."""
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
            outcome = lanes.advance(tier, bits, np.zeros(tier.shape))
            usual, drawn = routing.prior[0], routing.prior[0] * patterns.intensity
            yield Sample(
                features=features_of(routing, patterns.directions)[0].reshape(-1, 5),
                change=(shares(outcome.counts[0].astype(np.float64)) - usual).ravel(),
                gates=(routing.gates[0] - drawn).ravel(),
                energy=(shares(outcome.gate_energy[0]) - drawn).ravel(),
                intensity=patterns.intensity.ravel(),
            )
