"""Compiled loops of `ndp_gym.fillings`: what fillings of a layer cost, and what follows from one.

They read few plain arrays, which is what numba compiles and calls fastest: the indices below name
their rows and entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

SECOND, COPY_SECOND, FAR_SHARE, GPU_FACTOR, FAR_FACTOR = range(5)
"""Rows of ``rates`` [5, L]: prices and factors of each layer."""
BYTES, GPU_WEIGHT_S, LAUNCH_S, COPY_S = range(4)
"""Rows of ``widths`` [4, NB]: the nominal costs of a copy."""
TOKEN_S, FLOOR_S, LATENCY_S, ACTIVATION_S, OVERLAP, N_TOKENS, TOP_K, MOVES = range(8)
"""Entries of ``constants`` [8]; ``OVERLAP`` is -1 where the far device does not compute, ``MOVES``
is 1 where busy experts move to the GPU."""
OBJECTIVE, SECONDS, GPU_S, N_BYTES = range(4)
"""Entries of ``costs`` [4, L, C, E + 1]: see `ndp_gym.fillings.Fillings`."""
WIDTH, RANKING = range(2)
"""Entries of ``choices`` [2, C, L, E]: see `ndp_gym.fillings.Items`."""
CHARGED, GAIN = range(2)
"""Entries of ``values`` [2, C, L, E]."""
_OWN_S, _SIZE, _VARIANCE, _LOSS, _GAIN, _KEY = range(6)
"""Rows of a copy [6, E] in HBM: what it adds to the sums over a prefix, its gain and its place."""
_FAR_S, _FAR_VARIANCE, _FAR_LOSS, _DOUBT, _IDLE, _MOVED_S, _FAR_WIDTH = range(7)
"""Rows of ``far`` [7, E]: experts outside HBM, and what does not depend on where they are."""
_GPU, _FAR, _SPREAD, _LOST, _CHARGED, _HOT, _MOVED, _LAUNCHED, _OUTSIDE = range(9)
"""Rows of ``sums`` [9, X]: seconds of HBM experts and of the others, variance of the difference,
losses of all, bytes and load of HBM experts; of the others seconds if moved, launches then, and how
many are active."""
_RUN = 64
_PRESENT_FIRST = 1e9
_WHOLE_POWERS = 1024.0

_LOOP: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
_INNER = {**_LOOP, "cache": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Called by loops of this file alone: half the time to compile."""


@njit(**_INNER)
def _power(x, n, result):  # type: ignore[no-untyped-def]
    """``result = x ** n``; by squaring ``x`` where ``n`` is whole, several times faster."""
    if n != math.floor(n) or n > _WHOLE_POWERS:
        for k in range(result.size):
            result[k] = x[k] ** n
        return
    for k in range(result.size):
        result[k] = 1.0
    left = int(n)
    while left > 0:
        if left & 1:
            for k in range(result.size):
                result[k] *= x[k]
        for k in range(result.size):
            x[k] *= x[k]
        left >>= 1


@njit(**_INNER)
def _moved_share(ahead_s, far_s, moved_s, n_far):  # type: ignore[no-untyped-def]
    """Part of the far work that service ``balance`` moves where the GPU is done ``ahead_s`` before.

    A part of ``ahead_s / (moved_s + far_s)`` would leave both sides equally long. Experts move
    whole: of k, each of f far seconds and m if moved, the fraction is rounded up where it exceeds
    ``m / (m + f)``. That costs ``m f / (m + f) / 2`` on average, and ``k f`` where none moves.

    Returns:
        the part, and by how many seconds the longer side then exceeds what the GPU had.
    """
    if n_far < 1e-9:  # what rounding leaves where none is far
        return 0.0, 0.0
    share = ahead_s / (moved_s + far_s)
    lost = min(share, 0.5 * moved_s / (moved_s + far_s) / n_far)
    return share - lost * max(1.0 - far_s / moved_s, 0.0), share * moved_s + lost * far_s


@njit(**_INNER)
def _layer_seconds(seconds, sums, constants, room):  # type: ignore[no-untyped-def]
    """Fill expected seconds of a layer's experts: GPU and far branch, overlapped or in series.

    Entry by entry, so that processors do several at once.

    Args:
        seconds: to fill.
        sums: rows as named above; far seconds are without activations.
        constants: of the window.
        room: three arrays of scratch.
    """
    overlap, n_tokens, top_k = constants[OVERLAP], constants[N_TOKENS], constants[TOP_K]
    floor_s, latency_s = constants[FLOOR_S], constants[LATENCY_S]
    activation_s = constants[ACTIVATION_S]
    n = seconds.size
    if overlap < 0.0:
        for k in range(n):
            seconds[k] = sums[_GPU, k] + sums[_FAR, k]
        return
    # A token crosses unless all K experts are in HBM.
    x, stays, all_stay = room[0, :n], room[1, :n], room[2, :n]
    for k in range(n):
        x[k] = min(sums[_HOT, k] / (n_tokens * top_k), 1.0)
    _power(x, top_k, stays)
    for k in range(n):
        x[k] = stays[k]
    _power(x, n_tokens, all_stay)
    for k in range(n):
        any_far = 1.0 - all_stay[k]
        sent_s = any_far * 2.0 * latency_s + n_tokens * (1.0 - stays[k]) * activation_s
        gpu, far = sums[_GPU, k], max(any_far * floor_s, sent_s + sums[_FAR, k])
        # E max(G, N): exact where the means agree (normal difference) and where they lie far apart.
        apart, both = gpu - far, gpu + far
        longer = 0.5 * (both + math.sqrt(apart * apart + 2.0 / math.pi * sums[_SPREAD, k]))
        if constants[MOVES] > 0.0:
            n_far = sums[_OUTSIDE, k]
            moved, more_s = _moved_share(longer - gpu, far, sums[_MOVED, k], n_far)
            more_s += min(moved, 1.0 / max(n_far, 1e-12)) * sums[_LAUNCHED, k]
            longer, both = gpu + more_s, (1.0 - moved) * far + gpu + more_s
        seconds[k] = overlap * longer + (1.0 - overlap) * both


@njit(**_INNER)
def _cheapest(width, least, price, factor, far_s, lost):  # type: ignore[no-untyped-def]
    """Fill the ``width`` at which each expert is best outside HBM, and its objective ``least``.

    Width by width, as ``far_s`` and ``lost`` [NB, E] stand, so that processors do several at once.
    """
    for e in range(width.size):
        width[e], least[e] = 0, np.inf
    for b in range(lost.shape[0]):
        seconds, loss = far_s[b], lost[b]
        for e in range(width.size):
            value = price * (factor * seconds[e]) + loss[e]
            width[e] = b if value < least[e] else width[e]
            least[e] = value if value < least[e] else least[e]


@njit(**_INNER)
def _outside(far, width, room, rates, layer, overlap, active, widths, far_s, lost):  # type: ignore[no-untyped-def]
    """Fill ``far`` with the costs of the layer's experts at their best width outside HBM."""
    price = rates[SECOND, layer] * (overlap * rates[FAR_SHARE, layer] + 1.0 - overlap)
    factor = rates[FAR_FACTOR, layer]
    _cheapest(width, room, price, factor, far_s[layer], lost[layer])
    for e in range(width.size):
        seconds = factor * far_s[layer, width[e], e]
        # Variance of a time, by its expectation squared: an expert is active or not.
        doubt = (1.0 - active[layer, e]) / max(active[layer, e], 1e-12)
        far[_FAR_S, e], far[_FAR_LOSS, e] = seconds, lost[layer, width[e], e]
        far[_FAR_VARIANCE, e], far[_DOUBT, e] = seconds * seconds * doubt, doubt
        far[_IDLE, e], far[_FAR_WIDTH, e] = math.exp(-active[layer, e]), width[e]
        moved_s = (
            widths[COPY_S, width[e]] + rates[GPU_FACTOR, layer] * widths[GPU_WEIGHT_S, width[e]]
        )
        far[_MOVED_S, e] = active[layer, e] * moved_s


@njit(**_INNER)
def _inside(copies, best, least, far, rates, layer, overlap, byte, active, widths, lost, held):  # type: ignore[no-untyped-def]
    """Fill ``copies`` [NB, 6, E] of the layer's experts in HBM and the ``best`` width."""
    share = max(rates[FAR_SHARE, layer], 0.5)
    price = rates[SECOND, layer] * (1.0 - overlap * share)
    # Ranked as if the far device were at least as slow: HBM would else fill with cold experts.
    far_price = rates[SECOND, layer] * (overlap * share + 1.0 - overlap)
    for b in range(lost.shape[1]):
        for e in range(active.shape[1]):
            own, loss = held[layer, e], lost[layer, b, e]
            seconds = rates[GPU_FACTOR, layer] * active[layer, e] * widths[GPU_WEIGHT_S, b]
            copy_s = 0.0 if b == own else widths[COPY_S, b]
            copy_loss = rates[COPY_SECOND, layer] * copy_s
            cost = price * seconds + loss + copy_loss
            size = widths[BYTES, b]
            if own >= 0:
                size = max(size, widths[BYTES, own])
            gain = far_price * far[_FAR_S, e] + far[_FAR_LOSS, e] - cost
            copies[b, _OWN_S, e], copies[b, _SIZE, e] = seconds, size
            variance = seconds * seconds * far[_DOUBT, e]
            copies[b, _VARIANCE, e] = variance - far[_FAR_VARIANCE, e]
            copies[b, _LOSS, e] = loss + copy_loss - far[_FAR_LOSS, e]
            copies[b, _GAIN, e], copies[b, _KEY, e] = gain, byte * size - gain
            if b == 0 or cost + byte * size < least[e]:
                best[e], least[e] = b, cost + byte * size


@njit(**_INNER)
def _sort(order, key, spare, near):  # type: ignore[no-untyped-def]
    """Sort ``order`` by ``key``, equal ones as they stand; ``spare`` and ``near`` are scratch."""
    n = order.size
    for first in range(0, n, _RUN):
        size = min(_RUN, n - first)
        for i in range(size):
            spare[i], near[i] = order[first + i], key[order[first + i]]
        for i in range(size):
            order[first + i] = -1
        for i in range(size):  # counting has no branches: faster than moving, if few
            place = first
            for j in range(size):
                place += near[j] < near[i]
            while order[place] >= 0:
                place += 1
            order[place] = spare[i]
    width = _RUN
    while width < n:
        for first in range(0, n - width, 2 * width):
            middle, last = first + width, min(first + 2 * width, n)
            for i in range(first, middle):
                spare[i] = order[i]
            i, j, at = first, middle, first
            while i < middle:
                if j < last and key[order[j]] < key[spare[i]]:
                    order[at] = order[j]
                    j += 1
                else:
                    order[at] = spare[i]
                    i += 1
                at += 1
        width *= 2


@njit(**_INNER)
def _prefixes(sums, first, idle, order, width, copy, far, load, launch_s, token_s):  # type: ignore[no-untyped-def]
    """Fill ``sums`` up to `_HOT` from ``first`` on: the first k of ``order`` in HBM, others far."""
    n_experts = order.size
    own_s, rest_s, spread, loss, n_bytes, hot, launched_s = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for e in range(n_experts):
        rest_s += far[_FAR_S, e]
        loss += far[_FAR_LOSS, e]
        spread += far[_FAR_VARIANCE, e]
    for b in range(idle.size):
        idle[b] = 1.0
    for k in range(n_experts + 1):
        if k > 0:
            e = order[k - 1]
            own_s += copy[_OWN_S, e]
            rest_s -= far[_FAR_S, e]
            spread += copy[_VARIANCE, e]
            loss += copy[_LOSS, e]
            n_bytes += copy[_SIZE, e]
            hot += load[e]
            # One launch per width of which some expert is active.
            b = width[e]
            before = idle[b]
            idle[b] = before * far[_IDLE, e]
            launched_s += launch_s[b] * (before - idle[b])
        sums[_GPU, first + k] = launched_s + max(own_s, token_s * hot)
        sums[_FAR, first + k], sums[_SPREAD, first + k] = max(rest_s, 0.0), max(spread, 0.0)
        sums[_LOST, first + k], sums[_CHARGED, first + k], sums[_HOT, first + k] = (
            loss,
            n_bytes,
            hot,
        )


@njit(**_INNER)
def _movable(sums, first, idle, outside, order, width, far, active, launch_s):  # type: ignore[no-untyped-def]
    """Fill ``sums`` from `_MOVED` on, of the same prefixes as `_prefixes`."""
    moved_s = 0.0
    idle[:], outside[:] = 1.0, 0.0
    for e in range(order.size):
        moved_s += far[_MOVED_S, e]
        outside[int(far[_FAR_WIDTH, e])] += active[e]
    for k in range(order.size + 1):
        if k > 0:
            e = order[k - 1]
            moved_s -= far[_MOVED_S, e]
            outside[int(far[_FAR_WIDTH, e])] -= active[e]
            idle[width[e]] *= far[_IDLE, e]
        launched_s, n_far = 0.0, 0.0
        for b in range(idle.size):  # a launch more where no HBM expert of that width is active
            launched_s += outside[b] * idle[b] * launch_s[b]
            n_far += outside[b]
        sums[_MOVED, first + k], sums[_LAUNCHED, first + k] = max(moved_s, 0.0), launched_s
        sums[_OUTSIDE, first + k] = max(n_far, 0.0)


@njit(**_INNER)
def _picked(copy, width, c, copies, best, held):  # type: ignore[no-untyped-def]
    """Fill ``copy`` [6, E] and ``width`` of ranking ``c``, in which each expert has its own."""
    nb = copies.shape[0]
    for e in range(width.size):
        b, first = best[e], 0.0
        if c > nb and held[e] >= 0:
            b, first = held[e], _PRESENT_FIRST
        width[e] = b
        for row in range(copy.shape[0]):
            copy[row, e] = copies[b, row, e]
        copy[_KEY, e] -= first


@njit(**_LOOP)
def fill(rates, byte, load, active, widths, constants, far_s, lost, held, costs, choices, values):  # type: ignore[no-untyped-def]
    """Fill ``costs``, ``choices`` and ``values``: every prefix of every ranking of every layer.

    Rankings are by gain less the price of the bytes, ties by expert: HBM at each width alone, at
    the best one per expert, and the copies present first, at the width they have: ``held`` [L, E],
    -1 where there is none.
    """
    n_layers, nb, n_experts = lost.shape
    n_counts = n_experts + 1
    n_ways = (nb + 2) * n_counts
    copies, far = np.empty((nb + 2, 6, n_experts)), np.empty((7, n_experts))
    spare, near = np.empty(n_experts, np.int64), np.empty(n_experts)
    best = np.empty(n_experts, np.int64)
    sums, room = np.empty((9, n_ways)), np.empty((3, n_ways))
    idle, outside = np.empty(nb), np.empty(nb)
    overlap = max(constants[OVERLAP], 0.0)
    for layer in range(n_layers):
        _outside(far, best, near, rates, layer, overlap, active, widths, far_s, lost)
        _inside(
            copies[:nb], best, near, far, rates, layer, overlap, byte, active, widths, lost, held
        )
        token_s = rates[GPU_FACTOR, layer] * constants[TOKEN_S]
        for c in range(nb + 2):
            copy, width, order = copies[c], choices[WIDTH, c, layer], choices[RANKING, c, layer]
            if c < nb:
                width[:] = c
            else:
                _picked(copy, width, c, copies[:nb], best, held[layer])
            for e in range(n_experts):
                order[e] = e
            _sort(order, copy[_KEY], spare, near)
            first = c * n_counts
            _prefixes(
                sums, first, idle, order, width, copy, far, load[layer], widths[LAUNCH_S], token_s
            )
            if constants[MOVES] > 0.0:
                _movable(
                    sums, first, idle, outside, order, width, far, active[layer], widths[LAUNCH_S]
                )
            values[CHARGED, c, layer], values[GAIN, c, layer] = copy[_SIZE], copy[_GAIN]
        seconds = costs[SECONDS, layer].reshape(n_ways)
        _layer_seconds(seconds, sums, constants, room)
        objective = costs[OBJECTIVE, layer].reshape(n_ways)
        for way in range(n_ways):
            objective[way] = rates[SECOND, layer] * seconds[way] + sums[_LOST, way]
        costs[GPU_S, layer].reshape(n_ways)[:] = sums[_GPU]
        costs[N_BYTES, layer].reshape(n_ways)[:] = sums[_CHARGED]


@njit(**_LOOP)
def buy_far(  # type: ignore[no-untyped-def]
    rates, load, active, widths, constants, far_s, lost, shares, chosen, gpu_s, ranking, index
):
    """[L] of ``shares`` under which the layer is best, and [L, E] far width indices under them.

    ``shares`` [S] of the far device in the layer's time are tried; ``chosen`` are [L] flat indices
    into (C, E + 1). ``gpu_s``, ``ranking`` and ``index`` (of widths) are from `fill`.
    """
    n_layers, n_experts = active.shape
    best_share, best = np.empty(n_layers), np.empty((n_layers, n_experts), np.int64)
    hot, doubt, value = np.empty(n_experts, np.bool_), np.empty(n_experts), np.empty(n_experts)
    found, room = np.empty((shares.size, n_experts), np.int64), np.empty((3, shares.size))
    sums, total, idle = np.empty((9, shares.size)), np.empty(shares.size), np.empty(widths.shape[1])
    for layer in range(n_layers):
        c, count = chosen[layer] // (n_experts + 1), chosen[layer] % (n_experts + 1)
        for k in range(n_experts):
            hot[ranking[c, layer, k]] = k < count
        hot_variance, hot_load = 0.0, 0.0
        idle[:] = 1.0
        factor = rates[FAR_FACTOR, layer]
        for e in range(n_experts):
            doubt[e] = (1.0 - active[layer, e]) / max(active[layer, e], 1e-12)
            if hot[e]:
                own_s = widths[GPU_WEIGHT_S, index[c, layer, e]]
                own_s *= rates[GPU_FACTOR, layer] * active[layer, e]
                hot_variance += own_s * own_s * doubt[e]
                hot_load += load[layer, e]
                idle[index[c, layer, e]] *= math.exp(-active[layer, e])
        for i in range(shares.size):
            _cheapest(
                found[i], value, shares[i] * rates[SECOND, layer], factor, far_s[layer], lost[layer]
            )
            sums[:, i] = 0.0
            sums[_GPU, i], sums[_HOT, i] = gpu_s[layer, c, count], hot_load
            sums[_SPREAD, i] = hot_variance
            for e in range(n_experts):
                if not hot[e]:
                    b = found[i, e]
                    own_s = factor * far_s[layer, b, e]
                    moved_s = widths[COPY_S, b] + rates[GPU_FACTOR, layer] * widths[GPU_WEIGHT_S, b]
                    sums[_FAR, i] += own_s
                    sums[_LOST, i] += lost[layer, b, e]
                    sums[_SPREAD, i] += own_s * own_s * doubt[e]
                    sums[_MOVED, i] += active[layer, e] * moved_s
                    sums[_LAUNCHED, i] += active[layer, e] * idle[b] * widths[LAUNCH_S, b]
                    sums[_OUTSIDE, i] += active[layer, e]
        _layer_seconds(total, sums, constants, room)
        least, at = np.inf, 0
        for i in range(shares.size):
            objective = rates[SECOND, layer] * total[i] + sums[_LOST, i]
            if objective < least:
                least, at = objective, i
        best_share[layer] = shares[at]
        for e in range(n_experts):
            best[layer, e] = found[at, e]
    return best_share, best


@njit(**_LOOP)
def stage(bits, value, present_value, present, bytes_of, budget_bytes, can_arrive):  # type: ignore[no-untyped-def]
    """The bits and values, flat, of `ndp_gym.allocation.stage`; ``bytes_of`` is by bits."""
    n = bits.size
    staged, worth, key = np.empty(n, np.int64), np.empty(n), np.empty(n)
    order, spare, near = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    n_moving, charged = 0, 0.0
    for e in range(n):
        staged[e], worth[e] = bits[e], value[e]
        if bits[e] > 0 and bits[e] != present[e]:
            key[e], order[n_moving] = -value[e], e
            n_moving += 1
        elif bits[e] > 0:
            charged += bytes_of[bits[e]]
    arrived = _sorted_prefix(order[:n_moving], key, spare, near, bits, bytes_of, can_arrive)
    for k in range(n_moving):
        e = order[k]
        old = bytes_of[present[e]]
        if k < arrived:
            charged += max(old, bytes_of[bits[e]])
        else:
            charged += old
            staged[e] = present[e]
            if present[e] > 0:
                worth[e] = present_value[e]
    n_stale = 0
    for e in range(n):
        if present[e] > 0 and staged[e] == 0 and present_value[e] > 0.0:
            key[e], order[n_stale] = -present_value[e], e
            n_stale += 1
    room = budget_bytes - charged
    stay = _sorted_prefix(order[:n_stale], key, spare, near, present, bytes_of, room)
    for k in range(stay):
        e = order[k]
        staged[e], worth[e] = present[e], present_value[e]
    return staged, worth


@njit(**_INNER)
def _sorted_prefix(order, key, spare, near, bits, bytes_of, room):  # type: ignore[no-untyped-def]
    """Sort ``order`` by ``key``; how many of its first entries fit ``room`` together."""
    _sort(order, key, spare, near)
    used = 0.0
    for k in range(order.size):
        used += bytes_of[bits[order[k]]]
        if used > room:
            return k
    return order.size
