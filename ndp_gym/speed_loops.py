"""Compiled: what nominal costs say that a routed window takes, lane by lane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

GPU, FAR, LINK, LAUNCH, LATENCY = range(5)
"""Columns of seconds per decode step: three that scale with a device, two that do not."""

_INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Called by loops of this file alone: half the time to compile."""


@njit(cache=True, nogil=True)
def nominal_seconds(load, copies, costs, top_k, least_tokens, far_computes, fetched_s, seconds):  # type: ignore[no-untyped-def]
    """Add to ``seconds`` [N, 5] what each lane's routed experts take per decode step.

    Args:
        load: [N, L, E] routed tokens per decode step.
        copies: pairs, each of which is added: [N, L, E] width in HBM, 0 where the expert is not,
            and width of the others.
        costs: index of a width, then [N, NB] GPU, launch, far and copy seconds and far seconds per
            token, then [N] GPU seconds per token, link latency, seconds per activation.
        top_k: experts per token.
        least_tokens: the far device computes as for so many.
        far_computes: the far device computes what is not copied.
        fetched_s: [N] the link's nominal seconds of copies on demand.
        seconds: added to, columns as above.
    """
    n_lanes, n_layers, _ = load.shape
    chance, active = np.empty(load.shape[1:]), np.empty(load.shape[1:])
    for n in range(n_lanes):
        n_tokens = load[n].sum() / n_layers / top_k
        if n_tokens <= 0:
            continue
        for layer in range(n_layers):
            total = load[n, layer].sum()
            for e in range(load.shape[2]):
                chance[layer, e] = min(top_k * load[n, layer, e] / total, 1.0)
                active[layer, e] = 1 - (1 - chance[layer, e]) ** n_tokens
        for hbm_bits, far_bits in copies:
            given = load[n], chance, active, hbm_bits[n], far_bits[n]
            rest = n_tokens, top_k, least_tokens, far_computes, fetched_s[n]
            _add(seconds[n], n, given, costs, *rest)


@njit(**_INNER)
def _add(seconds, n, given, costs, n_tokens, top_k, least_tokens, far_computes, fetched_s):  # type: ignore[no-untyped-def]
    """Add to ``seconds`` [5] of lane ``n``, of which all ``given`` are [L, E]."""
    moved = 0.0
    if far_computes and fetched_s > 0:
        moved = min(fetched_s / max(_copies_s(n, given, costs), 1e-30), 1.0)
    seconds[LINK] += fetched_s
    load, chance, active, hbm_bits, far_bits = given
    index_of, gpu_w, launch, far_w, _, far_token, gpu_token, latency, activation = costs
    for layer in range(load.shape[0]):
        total = load[layer].sum()
        weights, tokens, hot_load, far, n_far, launched = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for b in range(gpu_w.shape[1]):
            idle, outside = 1.0, 0.0  # idle: no expert of this width is used on the GPU
            for e in range(load.shape[1]):
                is_hot = hbm_bits[layer, e] > 0
                bits = hbm_bits[layer, e] if is_hot else far_bits[layer, e]
                if index_of[bits] != b:
                    continue
                used, expected = active[layer, e], n_tokens * chance[layer, e]
                if is_hot or not far_computes:
                    weights += used * gpu_w[n, b]
                    tokens += expected
                    idle *= 1 - used
                if is_hot:
                    hot_load += load[layer, e]
                elif far_computes:
                    each = max(expected / max(used, 1e-12), least_tokens)
                    far += used * max(far_w[n, b], each * far_token[n, b])
                    outside += used
            seconds[LAUNCH] += launch[n, b] * (1 - idle)
            weights += moved * outside * gpu_w[n, b]
            launched += outside * idle * launch[n, b]
            n_far += outside
        seconds[GPU] += max(weights, tokens * gpu_token[n])
        seconds[LAUNCH] += min(moved, 1 / max(n_far, 1e-12)) * launched
        seconds[FAR] += (1 - moved) * far
        if far_computes:
            stays = min(hot_load / total, 1.0) ** top_k
            seconds[LINK] += n_tokens * (1 - stays) * activation[n]
            seconds[LATENCY] += 2 * latency[n] * (1 - math.pow(stays, n_tokens))


@njit(**_INNER)
def _copies_s(n, given, costs):  # type: ignore[no-untyped-def]
    """Seconds of a step in which all that lane ``n`` needs and has not in HBM is copied."""
    _, _, active, hbm_bits, far_bits = given
    index_of, copy = costs[0], costs[4]
    seconds = 0.0
    for layer in range(active.shape[0]):
        for e in range(active.shape[1]):
            if hbm_bits[layer, e] == 0:
                seconds += active[layer, e] * copy[n, index_of[far_bits[layer, e]]]
    return seconds
