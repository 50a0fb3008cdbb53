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
    """

    base: FloatArray
    prompts: FloatArray
    fast: FloatArray
    last: FloatArray
    gates: FloatArray
    prior: FloatArray


class LaneForecaster:
    """Memories of N lanes; ``shape`` is (L, E), ``profile`` [L, E] the train loads if known."""

    def __init__(
        self,
        n_lanes: int,
        shape: tuple[int, int],
        profile: ArrayLike | None = None,
        blend: Blend | None = None,
    ) -> None:
        """Nothing remembered."""
        prior = np.ones(shape) if profile is None else np.asarray(profile, np.float64)
        self._prior = np.broadcast_to(shares(prior), (n_lanes, *shape))
        self._blend = blend or Blend()
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
        return Routing(
            base=base,
            prompts=np.where(has_prompts[:, None, None], prompts, base),
            fast=fast,
            last=_or_else(last, base),
            gates=_or_else(observations["gate_share"].astype(np.float64), base),
            prior=self._prior,
        )

    def _remember(self, last: FloatArray, window: FloatArray) -> None:
        window = window * last.any(axis=(1, 2))
        decay = np.array([self._blend.decay, FAST_DECAY])[:, None]
        self._steps = np.where(window > 0, decay * self._steps + window, self._steps)
        rate = window / np.maximum(self._steps, 1e-12)
        self._average += rate[..., None, None] * (shares(last) - self._average)

    def mixed(self, routing: Routing, mix: FloatArray) -> FloatArray:
        """[N, L, E] shares for ``mix`` [N, L]: -1 prompts, 0 base, 1 fast; floored by the prior."""
        side = np.where(mix[..., None] < 0, routing.prompts, routing.fast)
        share = routing.base + np.abs(mix)[..., None] * (side - routing.base)
        return (1 - self._blend.floor) * share + self._blend.floor * routing.prior


def entry(context: NDArray[np.float32], name: str) -> FloatArray:
    """[N] the entry ``name`` of the observations' context vectors."""
    return context[:, CONTEXT_NAMES.index(name)].astype(np.float64)


def _or_else(load: FloatArray, share: FloatArray) -> FloatArray:
    return np.where(load.any(axis=(1, 2), keepdims=True), shares(load), share)
