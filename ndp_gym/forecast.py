"""What a policy expects of the coming window: loads, activity and gate energy per expert.

Built from an observation (the past) or from the true counts of the window (oracles only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.policy import Observation, context_entry
from ndp_gym.rules import check_numbers

FloatArray = NDArray[np.float64]

BLEND_RULES = {
    "prefill_tokens": "finite and >= 0",
    "decay": "in 0..1",
    "floor": "in 0..1",
    "gates": "in 0..1",
    "intensity": "finite and >= 0",
}
"""What the constants of `Blend` may be."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How the past is weighted.

    Attributes:
        prefill_tokens: decoded tokens that the prompts of the live requests are worth together.
        decay: what a window's memory keeps of its weight per later window.
        floor: share of a flat prior (the train profile where there is one), so that an expert that
            was not seen lately is not taken for impossible.
        gates: weight of the averaged gate energy in the expected one; the rest is the load's.
        intensity: exponent of an expert's energy per load, by which its load counts there; 0 takes
            all experts for alike.

    Raises:
        ValueError: a constant is not in its range (`BLEND_RULES`).
    """

    prefill_tokens: float = 64.0
    decay: float = 0.85
    floor: float = 0.12
    gates: float = 0.5
    intensity: float = 0.0

    def __post_init__(self) -> None:
        """Check every constant."""
        check_numbers(self, BLEND_RULES)

    def energy(self, share: FloatArray, gates: FloatArray, load: FloatArray) -> FloatArray:
        """Expected shares of gate energy, [..., L, E].

        Averages of gate energy are noisy, but so is the load that they come from, in the same way:
        energy per load is what an expert keeps.

        Args:
            share: expected shares of the load.
            gates: averaged shares of gate energy.
            load: averaged as ``gates`` are; all 0 before there is any.
        """
        seen = load.sum(axis=-1, keepdims=True)
        expected = share
        if self.intensity > 0 and seen.all():
            steady = _STEADY * share + 1e-12  # no load, no share: as much energy as load
            each = (gates + steady) / (load / seen + steady)
            expected = share * each**self.intensity
            expected = expected / expected.sum(axis=-1, keepdims=True)
        mixed: FloatArray = self.gates * gates + (1 - self.gates) * expected
        return mixed


_STEADY = 0.5
"""Averaged shares that an expert's energy per load of 1 is worth (chosen on val)."""


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


class Forecaster:
    """Routing expected from one lane's observations, one call per window.

    Prompts count like ``prefill_tokens`` decoded tokens, decoded windows with exponentially falling
    weight. Where a share of the batch was just admitted, that share of the memory is of requests
    that have left: it is forgotten.

    Args:
        blend: weights.
        top_k: experts per token.
        profile: [L, E] loads on the train split, ``None`` for a flat prior.
    """

    def __init__(self, blend: Blend, top_k: int, profile: ArrayLike | None = None) -> None:
        """Start an episode with an empty memory."""
        self.blend, self.top_k = blend, top_k
        self._prior = None if profile is None else shares(np.asarray(profile, dtype=np.float64))
        self._steps = 0.0
        self._average: FloatArray | float = 0.0

    def __call__(self, observation: Observation) -> Forecast:
        """The expected routing of the window to come."""
        n_live = max(context_entry(observation, "n_live"), 1.0)
        self._remember(observation)
        self._steps *= 1 - min(context_entry(observation, "n_admitted") / n_live, 1.0)
        prefill = np.asarray(observation["prefill_load"], dtype=np.float64)
        known = self.blend.prefill_tokens / n_live if prefill.any() else 0.0
        known = known if known + self._steps > 0 else 1.0
        share = (known * shares(prefill) + self._steps * self._average) / (known + self._steps)
        prior = 1 / share.shape[1] if self._prior is None else self._prior
        share = (1 - self.blend.floor) * share + self.blend.floor * prior
        gates = np.asarray(observation["gate_share"], dtype=np.float64)
        energy = share
        if gates.any():
            load = np.asarray(observation["ema_load"], dtype=np.float64)
            energy = self.blend.energy(share, shares(gates), load)
        context = n_live * context_entry(observation, "mean_context")
        return expected(share, n_live, context, self.top_k)._replace(energy=energy)

    def _remember(self, observation: Observation) -> None:
        last = np.asarray(observation["last_load"], dtype=np.float64)
        if not last.any():
            return
        window = context_entry(observation, "window")
        self._steps = self.blend.decay * self._steps + window
        self._average = self._average + window / self._steps * (shares(last) - self._average)


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


def mixed(first: Forecast, second: Forecast, weight: float) -> Forecast:
    """Loads, activity and energies with ``weight`` on ``first``; tokens and context are its own."""
    return first._replace(
        load=weight * first.load + (1 - weight) * second.load,
        active=weight * first.active + (1 - weight) * second.active,
        energy=weight * first.energy + (1 - weight) * second.energy,
    )


def shares(load: FloatArray) -> FloatArray:
    """``load`` [L, E] divided by its sum over the experts of the layer; flat where that is 0."""
    total = load.sum(axis=-1, keepdims=True)
    flat = np.full_like(load, 1 / load.shape[-1])
    return np.where(total > 0, load / np.maximum(total, 1e-300), flat)
