"""Synthetic routing with skew per expert and per request, for the placement sweep.

``logit = 0.6 N(0, 1)`` per (layer, expert) ``+ 0.85 N(0, 1)`` per (request, layer, expert); each
token takes the experts of the ``k`` largest Gumbel-perturbed logits. That equals drawing without
replacement in proportion to ``exp(logit)``, which is how it is drawn here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

POPULARITY_SKEW = 0.6
REQUEST_SKEW = 0.85


class Routing(NamedTuple):
    """Generated requests.

    Attributes:
        prefill_load: Tokens per (request, layer, expert) in prefill, [R, L, E].
        decode: Ids of the decode tokens, [R, D, L, K] int16.
    """

    prefill_load: npt.NDArray[np.float64]
    decode: npt.NDArray[np.int16]

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return int(self.prefill_load.shape[2])


def generate(
    rng: np.random.Generator,
    *,
    n_layers: int,
    n_experts: int,
    top_k: int,
    n_requests: int,
    n_prompt: int,
    n_decode: int,
    popularity_skew: float = POPULARITY_SKEW,
    request_skew: float = REQUEST_SKEW,
) -> Routing:
    """Ids of ``n_requests`` requests that share the popularity of experts."""
    popularity = popularity_skew * rng.standard_normal((n_layers, n_experts))
    n_tokens = n_prompt + n_decode
    ids = np.empty((n_requests, n_tokens, n_layers, top_k), dtype=np.int16)
    for request in range(n_requests):
        logits = popularity + request_skew * rng.standard_normal((n_layers, n_experts))
        _draw(np.cumsum(np.exp(logits), axis=1), ids[request], rng)
    load = [[np.bincount(row, minlength=n_experts) for row in _by_layer(r[:n_prompt])] for r in ids]
    return Routing(np.array(load, dtype=np.float64), ids[:, n_prompt:])


def _by_layer(ids: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Ids [n, L, K] of each layer in one row, [L, n * K]."""
    return ids.transpose(1, 0, 2).reshape(ids.shape[1], -1)


@njit(cache=True)
def _draw(cumulative, ids, rng):  # type: ignore[no-untyped-def]
    """Fill ``ids`` [T, L, K] without replacement; a repeated draw is drawn again."""
    n_tokens, n_layers, top_k = ids.shape
    taken = np.full(cumulative.shape[1], -1, dtype=np.int64)
    for t in range(n_tokens):
        for layer in range(n_layers):
            row = cumulative[layer]
            mark = t * n_layers + layer
            drawn = 0
            while drawn < top_k:
                e = np.searchsorted(row, rng.random() * row[-1], side="right")
                if taken[e] != mark:
                    taken[e] = mark
                    ids[t, layer, drawn] = e
                    drawn += 1
