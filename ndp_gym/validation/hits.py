"""Hits of fixed residencies and of a per-layer LRU cache, counted on recorded routing.

What ``transition`` would count at batch 1, kept per token and layer, because the published
baselines need the joint distribution and not the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace

Ints: TypeAlias = npt.NDArray[np.int64]

MIN_DECODE = 65
"""Decode tokens a request of the Mixtral recording must have to be used."""


class Part(NamedTuple):
    """One request: ids of its prefill and of its decode rows, [n, L, K] each."""

    prefill: Ints
    decode: Ints


def parts_of(trace: RoutingTrace, min_decode: int = MIN_DECODE) -> list[Part]:
    """Requests with at least ``min_decode`` decode rows, in file order."""
    return list(_parts(trace, min_decode))


def _parts(trace: RoutingTrace, min_decode: int) -> Iterator[Part]:
    r = trace.requests
    for i in np.flatnonzero(r.n_decode >= min_decode):
        middle = r.start[i] + r.n_prompt[i]
        ids = trace.expert_ids
        yield Part(
            ids[r.start[i] : middle].astype(np.int64), ids[middle : r.end[i]].astype(np.int64)
        )


def counts(ids: Ints, n_experts: int) -> Ints:
    """Tokens per (layer, expert) of ``ids`` [n, L, K]: [L, E]."""
    layers = [np.bincount(ids[:, i].ravel(), minlength=n_experts) for i in range(ids.shape[1])]
    return np.stack(layers)


def top_experts(load: npt.NDArray[np.generic], n_resident: int) -> npt.NDArray[np.bool_]:
    """The ``n_resident`` experts of highest load per layer, [L, E]; ties go to the lower id."""
    order = np.argsort(-np.asarray(load, dtype=np.float64), axis=1, kind="stable")
    resident = np.zeros(load.shape, dtype=np.bool_)
    np.put_along_axis(resident, order[:, :n_resident], True, axis=1)
    return resident


def off_gpu(ids: Ints, resident: npt.NDArray[np.bool_]) -> Ints:
    """Activations of each (token, layer) outside the resident experts, [n, L]."""
    layers = np.arange(resident.shape[0])[None, :, None]
    return np.asarray((~resident[layers, ids]).sum(axis=2), dtype=np.int64)


def prefill_guided(parts: Sequence[Part], n_experts: int, n_resident: int) -> Ints:
    """Off-GPU hits [n, L] where each request keeps the experts its own prefill used most."""
    return np.concatenate(
        [off_gpu(p.decode, top_experts(counts(p.prefill, n_experts), n_resident)) for p in parts]
    )


def static(parts: Sequence[Part], load: npt.NDArray[np.generic], n_resident: int) -> Ints:
    """Off-GPU hits [n, L] where all requests keep the same experts, those of highest ``load``."""
    resident = top_experts(load, n_resident)
    return np.concatenate([off_gpu(p.decode, resident) for p in parts])


def pooled_load(parts: Sequence[Part], n_experts: int) -> Ints:
    """Decode tokens per (layer, expert) over all requests, [L, E]."""
    return np.asarray(np.sum([counts(p.decode, n_experts) for p in parts], axis=0))


def lru_misses(parts: Sequence[Part], capacity: int) -> tuple[int, int]:
    """Decode misses by rank of a per-layer LRU cache that starts empty at each request.

    A top-2 rule: both ids are tested against the cache as it was before the token, then rank 2 and
    after it rank 1 become the most recent. Prefill rows warm the cache and are not counted.
    """
    missed = [0, 0]
    for part in parts:
        for layer in range(part.decode.shape[1]):
            recent: list[int] = []
            for one, two in part.prefill[:, layer].tolist():
                recent = _touched(recent, one, two, capacity)
            for one, two in part.decode[:, layer].tolist():
                missed[0] += one not in recent
                missed[1] += two not in recent
                recent = _touched(recent, one, two, capacity)
    return missed[0], missed[1]


def _touched(recent: list[int], one: int, two: int, capacity: int) -> list[int]:
    kept = [e for e in recent if e not in (one, two)]
    return [*kept, two, one][-capacity:]


def closed_form_distinct(trace: RoutingTrace, batch: int) -> float:
    """Mean distinct experts per layer of ``batch`` tokens drawn with replacement from the trace.

    ``mean over layers of sum_e 1 - (1 - p_e)^B`` with ``p_e`` the share of tokens that use ``e``.
    """
    share = counts(np.asarray(trace.expert_ids, dtype=np.int64), trace.n_experts) / trace.n_rows
    return float((1 - (1 - share) ** batch).sum(axis=1).mean())
