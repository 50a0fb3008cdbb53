"""The reward as named terms: throughput against a stateless reference, and the quality it costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ndp_gym.outcome import Outcome

QUALITY_WEIGHTS = {"speed": 1.0, "balanced": 4.0, "quality": 16.0}
"""Named weights of the quality term, in 1 / nat."""


def quality_weight(name_or_value: str | float) -> float:
    """The weight in 1 / nat behind a name of `QUALITY_WEIGHTS`, or the number itself.

    Raises:
        ValueError: unknown name, or a number that is negative or not finite.
    """
    if isinstance(name_or_value, str):
        if name_or_value not in QUALITY_WEIGHTS:
            raise ValueError(
                f"quality_weight must be one of {list(QUALITY_WEIGHTS)} or a number, "
                f"got {name_or_value!r}"
            )
        return QUALITY_WEIGHTS[name_or_value]
    value = float(name_or_value)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"quality_weight must be finite and >= 0, got {value}")
    return value


def reward_terms(outcome: Outcome) -> dict[str, NDArray[np.float64]]:
    """The unweighted terms of `reward`.

    Returns:
        ``throughput``: log(T_ref / T), +0.01 is about 1 % more tokens per second; ``quality``:
        -(D - D_ref) in nats; ``energy``: -joules per token (unvalidated, weight 0). Scalars, or
        [N] where the outcome has lanes.
    """
    return {
        "throughput": np.log(outcome.ref_decode_s / outcome.decode_s),
        "quality": outcome.ref_delta_nll - outcome.delta_nll,
        "energy": -outcome.energy_j / outcome.tokens,
    }


def reward(
    terms: dict[str, NDArray[np.float64]], weight: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """log(T_ref / T) - weight (D - D_ref): the same counts all far at 4 bit score 0."""
    return terms["throughput"] + weight * terms["quality"]
