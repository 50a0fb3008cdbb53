"""What a policy expects of the coming window: loads, activity and gate energy per expert.

Built from an observation (the past) or from the true counts of the window (oracles only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.policy import Observation, context_entry

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How past loads are mixed.

    Attributes:
        prefill: weight of the prefill's load once there are decode windows; requests that were just
            admitted have no other history, so their share of the batch counts fully as prefill.
        last: weight of the last window against the exponential average, within the rest.
        floor: share of a flat prior (the train profile where there is one), so that an expert that
            was not seen lately is not taken for impossible.
    """

    prefill: float = 0.2
    last: float = 0.0
    floor: float = 0.05


class Forecast(NamedTuple):
    """Expected routing of one window.

    Attributes:
        load: [L, E] tokens per decode step.
        active: [L, E] probability that a step uses the expert.
        energy: [L, E] shares of the layer's gate energy, sum 1 over the experts.
        n_tokens: tokens per decode step.
        context: context tokens of all live requests together.
        top_k: experts per token.
    """

    load: FloatArray
    active: FloatArray
    energy: FloatArray
    n_tokens: float
    context: float
    top_k: int


def forecast(
    observation: Observation, top_k: int, blend: Blend, profile: ArrayLike | None = None
) -> Forecast:
    """The expected routing, from the observation alone.

    Args:
        observation: without lane axis.
        top_k: experts per token.
        blend: weights of the mixture.
        profile: [L, E] loads on the train split, or ``None`` for a flat prior.
    """
    share = _blended_share(observation, blend)
    prior = np.ones_like(share) if profile is None else np.asarray(profile, dtype=np.float64)
    share = (1 - blend.floor) * share + blend.floor * shares(prior)
    n_tokens = max(context_entry(observation, "n_live"), 1.0)
    gates = np.asarray(observation["gate_share"], dtype=np.float64)
    # Half of the energy share is the load's: gate energy of single windows is noisy.
    energy = share if gates.sum() == 0 else 0.5 * shares(gates) + 0.5 * share
    context = n_tokens * context_entry(observation, "mean_context")
    return expected(share, n_tokens, context, top_k)._replace(energy=energy)


def expected(share: FloatArray, n_tokens: float, context: float, top_k: int) -> Forecast:
    """Routing in which every token picks experts independently, with chances ``K * share``."""
    chance = np.minimum(top_k * share, 1.0)
    return Forecast(
        load=n_tokens * chance,
        active=1 - (1 - chance) ** n_tokens,
        energy=share,
        n_tokens=n_tokens,
        context=context,
        top_k=top_k,
    )


def known(counts: ArrayLike, context: float, top_k: int) -> Forecast:
    """The forecast of an oracle that was told the counts [W, L, E] of the window."""
    tokens = np.asarray(counts, dtype=np.float64)
    per_step = tokens.sum(axis=(1, 2))
    tokens = tokens[per_step > 0] if per_step.any() else tokens[:1]
    load = tokens.mean(axis=0)
    n_tokens = max(float(load.sum(axis=1).mean()) / top_k, 1e-9)
    return Forecast(
        load=load,
        active=(tokens > 0).mean(axis=0),
        energy=shares(load),
        n_tokens=n_tokens,
        context=context,
        top_k=top_k,
    )


def shares(load: FloatArray) -> FloatArray:
    """``load`` [L, E] divided by its sum over the experts of the layer; flat where that is 0."""
    total = load.sum(axis=-1, keepdims=True)
    flat = np.full_like(load, 1 / load.shape[-1])
    return np.where(total > 0, load / np.maximum(total, 1e-300), flat)


def _blended_share(observation: Observation, blend: Blend) -> FloatArray:
    """[L, E] shares: prefill, last window and average, weighted by what they can know."""
    prefill, last, average = (
        np.asarray(observation[f"{name}_load"], dtype=np.float64)
        for name in ("prefill", "last", "ema")
    )
    weight = 1.0
    if average.sum() > 0:
        live = max(context_entry(observation, "n_live"), 1.0)
        fresh = min(context_entry(observation, "n_admitted") / live, 1.0)
        weight = blend.prefill + (1 - blend.prefill) * fresh
    if prefill.sum() == 0 and average.sum() > 0:
        weight = 0.0
    decode = blend.last * shares(last) + (1 - blend.last) * shares(average)
    return weight * shares(prefill) + (1 - weight) * decode
