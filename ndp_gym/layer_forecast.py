"""What layer agents expect of the coming window: routing of N lanes, from observations alone.

The same blend of prompts, past windows and train profile as `ndp_gym.forecast.Forecaster`, for many
lanes at once and with a faster memory beside the slow one, so that an agent can choose between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.forecast import Blend, shares
from ndp_gym.lanes import CONTEXT_NAMES, Observations
from ndp_gym.policy import Patterns

FloatArray = NDArray[np.float64]
FAST_DECAY = 0.5
"""What the fast memory keeps of its weight per later window."""


class Routing(NamedTuple):
    """Shares of a layer's tokens that each expert gets, [N, L, E], by what they are taken from.

    Attributes:
        base: prompts and slow memory blended, what `Forecaster` expects before its floor.
        prompts: of the live requests; ``base`` where they have none.
        fast: prompts and fast memory blended.
        last: the last window; ``base`` before there is one.
        gates: gate energy; ``base`` before there is any.
        prior: train profile, or flat.
        expected: of the coming window: ``base`` floored by the prior, or a learned forecast.
    """

    base: FloatArray
    prompts: FloatArray
    fast: FloatArray
    last: FloatArray
    gates: FloatArray
    prior: FloatArray
    expected: FloatArray


class Learned(NamedTuple):
    """A forecast that was fitted on a train split, in place of the blend (`train.forecast`).

    The share expected of an expert is the prior's, plus what slow memory, fast memory and prompts
    say beyond it, as they are and projected on the directions, each by its weight. Gate energy is
    the averaged one by its weight, the rest by what an expert draws per load.

    Attributes:
        patterns: of the train split.
        weights: [5, 6] a row for 1, 2, 4, 8 and 16 live requests; columns: slow, fast, the
            projections of slow, fast and prompts, and averaged gate energy.
    """

    patterns: Patterns
    weights: FloatArray

    def shares(self, routing: Routing, n_live: FloatArray) -> FloatArray:
        """[N, L, E] from the blends; none is below a tenth of the prior."""
        weights = self._at(n_live)[:, :5]
        features = features_of(routing, self.patterns.directions)
        change = (features @ weights[:, None, :, None])[..., 0]
        found = np.maximum(routing.prior + change, 0.1 * routing.prior)
        return np.asarray(found / found.sum(axis=-1, keepdims=True))

    def energy(self, share: FloatArray, gates: FloatArray, n_live: FloatArray) -> FloatArray:
        """[N, L, E] expected shares of gate energy for loads ``share``; ``gates``: averaged."""
        weight = self._at(n_live)[:, 5, None, None]
        drawn = share * self.patterns.intensity
        drawn = drawn / drawn.sum(axis=-1, keepdims=True)
        return np.asarray(weight * gates + (1 - weight) * drawn)

    def _at(self, n_live: FloatArray) -> FloatArray:
        row, rows = np.log2(n_live).clip(0, len(self.weights) - 1), np.arange(len(self.weights))
        return np.stack([np.interp(row, rows, column) for column in self.weights.T], axis=-1)


def features_of(routing: Routing, directions: FloatArray) -> FloatArray:
    """[N, L, E, 5] what the first weights of `Learned` are for."""
    flat = directions.reshape(len(directions), -1)
    beyond = [part - routing.prior for part in (routing.base, routing.fast, routing.prompts)]
    inside = [(b.reshape(len(b), -1) @ flat.T @ flat).reshape(b.shape) for b in beyond]
    return np.stack([*beyond[:2], *inside], axis=-1)


def learned_of(weights: FloatArray | None, patterns: Patterns | None) -> Learned | None:
    """The forecast of an agent on a recording; ``None`` where either lacks it."""
    if weights is None or patterns is None:
        return None
    return Learned(patterns, weights)


class LaneForecaster:
    """Memories of N lanes; ``shape`` is (L, E), ``profile`` [L, E] the train loads if known."""

    def __init__(
        self,
        n_lanes: int,
        shape: tuple[int, int],
        profile: ArrayLike | None = None,
        blend: Blend | None = None,
        learned: Learned | None = None,
    ) -> None:
        """Nothing remembered."""
        prior = np.ones(shape) if profile is None else np.asarray(profile, np.float64)
        self._prior = np.broadcast_to(shares(prior), (n_lanes, *shape))
        self._blend = blend or Blend()
        self._learned = learned
        self._steps = np.zeros((2, n_lanes))
        self._average = np.zeros((2, n_lanes, *shape))

    def reset(self, lane: int) -> None:
        """Start one lane's episode with an empty memory."""
        self._steps[:, lane] = 0
        self._average[:, lane] = 0

    def __call__(self, observations: Observations, only: Sequence[int] | None = None) -> Routing:
        """The expected routing of the coming windows; each window is to be counted once per lane.

        Lanes that are not among ``only`` keep the memory they have.
        """
        last = observations["last_load"].astype(np.float64)
        prefill = observations["prefill_load"].astype(np.float64)
        context = observations["context"]
        n_live = np.maximum(entry(context, "n_live"), 1.0)
        learns = np.ones(len(last), np.bool_)
        if only is not None:
            learns = np.isin(np.arange(len(last)), only)
        self._remember(last, entry(context, "window") * learns)
        left = np.minimum(entry(context, "n_admitted") / n_live, 1.0) * learns
        self._steps *= 1 - left
        has_prompts = np.asarray(prefill.any(axis=(1, 2)))
        known = np.where(has_prompts, self._blend.prefill_tokens / n_live, 0.0)
        known = np.where(known + self._steps > 0, known, 1.0)
        weight = (known / (known + self._steps))[..., None, None]
        prompts = shares(prefill)
        base, fast = weight * prompts + (1 - weight) * self._average
        found = Routing(
            base=base,
            prompts=np.where(has_prompts[:, None, None], prompts, base),
            fast=fast,
            last=_or_else(last, base),
            gates=_or_else(observations["gate_share"].astype(np.float64), base),
            prior=self._prior,
            expected=base,
        )
        floor = self._blend.floor
        expected = (1 - floor) * base + floor * self._prior
        if self._learned is not None:
            expected = self._learned.shares(found, n_live)
        return found._replace(expected=expected)

    def _remember(self, last: FloatArray, window: FloatArray) -> None:
        window = window * last.any(axis=(1, 2))
        decay = np.array([self._blend.decay, FAST_DECAY])[:, None]
        self._steps = np.where(window > 0, decay * self._steps + window, self._steps)
        rate = window / np.maximum(self._steps, 1e-12)
        self._average += rate[..., None, None] * (shares(last) - self._average)

    def mixed(self, routing: Routing, mix: FloatArray) -> FloatArray:
        """[N, L, E] shares for ``mix`` [N, L]: -1 prompts, 0 what is expected, 1 fast memory."""
        side = np.where(mix[..., None] < 0, routing.prompts, routing.fast)
        side = (1 - self._blend.floor) * side + self._blend.floor * routing.prior
        return np.asarray(routing.expected + np.abs(mix)[..., None] * (side - routing.expected))


def entry(context: NDArray[np.float32], name: str) -> FloatArray:
    """[N] the entry ``name`` of the observations' context vectors."""
    return context[:, CONTEXT_NAMES.index(name)].astype(np.float64)


def _or_else(load: FloatArray, share: FloatArray) -> FloatArray:
    return np.where(load.any(axis=(1, 2), keepdims=True), shares(load), share)
