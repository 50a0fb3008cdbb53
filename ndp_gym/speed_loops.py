"""Compiled: what nominal costs say that a routed window takes, lane by lane."""

from __future__ import annotations

import math

from numba import njit

GPU, FAR, LINK, LAUNCH, LATENCY = range(5)
"""Columns of seconds per decode step: three that scale with a device, two that do not."""


@njit(cache=True, nogil=True)
def nominal_seconds(load, hbm_bits, far_bits, costs, top_k, least_tokens, in_place, seconds):  # type: ignore[no-untyped-def]
    """Add to ``seconds`` [N, 5] what each lane's routed experts take per decode step.

    Args:
        load: [N, L, E] routed tokens per decode step.
        hbm_bits: [N, L, E] width in HBM, 0 where the expert is not.
        far_bits: [N, L, E] width of the others.
        costs: index of a width, then [N, NB] GPU, launch, far and copy seconds and far seconds per
            token, then [N] GPU seconds per token, link latency, seconds per activation.
        top_k: experts per token.
        least_tokens: the far device computes as for so many.
        in_place: the far device computes.
        seconds: added to, columns as above.
    """
    index_of, gpu_w, launch, far_w, copy, far_token, gpu_token, latency, activation = costs
    n_lanes, n_layers, n_experts = load.shape
    n_widths = gpu_w.shape[1]
    for n in range(n_lanes):
        n_tokens = load[n].sum() / n_layers / top_k
        if n_tokens <= 0:
            continue
        for layer in range(n_layers):
            total = load[n, layer].sum()
            weights, tokens, hot_load, far, copies = 0.0, 0.0, 0.0, 0.0, 0.0
            for b in range(n_widths):
                idle = 1.0  # no expert of this width is used on the GPU
                for e in range(n_experts):
                    is_hot = hbm_bits[n, layer, e] > 0
                    bits = hbm_bits[n, layer, e] if is_hot else far_bits[n, layer, e]
                    if index_of[bits] != b:
                        continue
                    chance = min(top_k * load[n, layer, e] / total, 1.0)
                    active = 1 - (1 - chance) ** n_tokens
                    expected = n_tokens * chance
                    if is_hot or not in_place:
                        weights += active * gpu_w[n, b]
                        tokens += expected
                        idle *= 1 - active
                    if is_hot:
                        hot_load += load[n, layer, e]
                    elif in_place:
                        each = max(expected / max(active, 1e-12), least_tokens)
                        far += active * max(far_w[n, b], each * far_token[n, b])
                    else:
                        copies += active * copy[n, b]
                seconds[n, LAUNCH] += launch[n, b] * (1 - idle)
            seconds[n, GPU] += max(weights, tokens * gpu_token[n])
            seconds[n, FAR] += far
            seconds[n, LINK] += copies
            if in_place:
                stays = min(hot_load / total, 1.0) ** top_k
                seconds[n, LINK] += n_tokens * (1 - stays) * activation[n]
                seconds[n, LATENCY] += 2 * latency[n] * (1 - math.pow(stays, n_tokens))
