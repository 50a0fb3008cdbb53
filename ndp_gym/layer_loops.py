"""Compiled loops of the layer agents: prices and forecasts to one plan per lane.

Every expert takes the cheapest of: far at its best width, HBM at any width plus a price per byte.
The byte price rises in a layer until its GPU side is no slower than its far side, and in all layers
until the budget holds.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

FAR_VALUE, PRICE, HYSTERESIS, MIX = range(4)
"""The four numbers of a layer's action."""
_ROUNDS = 20  # halvings of a price range of six decades
_UNKNOWN = 100  # no choice, nor is its negative


@njit(cache=True, nogil=True)
def cheapest(e, byte_price, far_cost, hbm_cost, n_bytes):  # type: ignore[no-untyped-def]
    """Width index in HBM of the layer's expert at this byte price, -1 where it stays far."""
    best, index = far_cost[e], -1
    for b in range(hbm_cost.shape[1]):
        cost = hbm_cost[e, b] + byte_price * n_bytes[e, b]
        if cost < best:
            best, index = cost, b
    return index


@njit(cache=True, nogil=True)
def doubted(doubts, n_doubts, known, choice, below, above):  # type: ignore[no-untyped-def]
    """Note the ``choice`` [E] at a price in ``known``, which is one of ``below`` and ``above``.

    Experts whose choices at a lower and at a higher price are the same are settled, since dearer
    bytes only ever mean fewer: they leave ``doubts``, of which the first ``n_doubts`` count.

    Returns:
        How many are left.
    """
    left = 0
    for k in range(n_doubts):
        e = doubts[k]
        known[e] = choice[e]
        if below[e] != above[e]:
            doubts[left] = e
            left += 1
    return left


@njit(cache=True, nogil=True)
def excess_s(choice, busy, gpu_s, far_s, launch_s, load, active, factor, constants):  # type: ignore[no-untyped-def]
    """Seconds by which the GPU side of a layer exceeds its far side; ``busy`` [NB] is scratch."""
    token_s, latency_s, activation_s, floor_s, n_tokens, top_k = constants
    busy[:] = 0.0
    gpu, far, hbm_load = 0.0, 0.0, 0.0
    for e in range(choice.size):
        index = choice[e]
        if index >= 0:
            gpu += gpu_s[e, index]
            busy[index] += active[e]
            hbm_load += load[e]
        else:
            far += far_s[e]
    gpu = max(gpu, hbm_load * token_s)
    for b in range(busy.size):
        if busy[b] > 0.0:
            gpu += launch_s[b] * (1 - math.exp(-busy[b]))
    stays = min(hbm_load / (n_tokens * top_k), 1.0) ** top_k
    any_far = 1 - stays**n_tokens
    far += any_far * 2 * latency_s + n_tokens * (1 - stays) * activation_s
    return gpu - factor * max(far, any_far * floor_s)


@njit(cache=True, nogil=True)
def balanced_price(layer, top_price, costs, seconds, loads, constants, room):  # type: ignore[no-untyped-def]
    """Least byte price at which the GPU side of a layer is no slower than its far side.

    ``room`` are four arrays [L, E] of scratch.
    """
    far_cost, hbm_cost, n_bytes = costs[0][layer], costs[1][layer], costs[2][layer]
    gpu_s, far_s, launch_s = seconds[0][layer], seconds[1][layer], seconds[2]
    load, active, factor = loads[0][layer], loads[1][layer], loads[2][layer]
    below, above, choice, doubts = room[0][layer], room[1][layer], room[2][layer], room[3][layer]
    busy, n_doubts = np.empty(launch_s.size), choice.size
    below[:], above[:], doubts[:] = _UNKNOWN, -_UNKNOWN, np.arange(choice.size)
    low, high = top_price * 1e-6, top_price
    for step in range(_ROUNDS + 1):
        middle = low if step == 0 else math.sqrt(low * high)
        for k in range(n_doubts):
            choice[doubts[k]] = cheapest(doubts[k], middle, far_cost, hbm_cost, n_bytes)
        if excess_s(choice, busy, gpu_s, far_s, launch_s, load, active, factor, constants) > 0:
            low = middle
            n_doubts = doubted(doubts, n_doubts, below, choice, below, above)
        else:
            high = middle
            n_doubts = doubted(doubts, n_doubts, above, choice, below, above)
            if step == 0:
                break
    return high


@njit(cache=True, nogil=True)
def settle(layers, least, costs, budget, top_price, chosen, room):  # type: ignore[no-untyped-def]
    """Fill the rows ``layers`` = (first, last + 1) of ``chosen`` [L, E] within ``budget`` bytes.

    Entries are HBM width indices, -1 far; no byte costs less than ``least`` [L]; ``room`` are four
    arrays [L, E] of scratch.

    Returns:
        Bytes left over.
    """
    far_cost, hbm_cost, n_bytes = costs
    below, above, _, doubts = room
    first, last = layers
    n_experts = chosen.shape[1]
    n_doubts = np.full(last, n_experts)
    settled = 0.0  # bytes of the experts without doubt; sums of whole numbers are exact
    for i in range(first, last):
        below[i], above[i], doubts[i] = _UNKNOWN, -_UNKNOWN, np.arange(n_experts)
    low, high = top_price * 1e-6, top_price * 1.01
    for step in range(_ROUNDS + 1):
        middle = low if step == 0 else math.sqrt(low * high)
        total = settled
        for i in range(first, last):
            price = max(middle, least[i])
            for k in range(n_doubts[i]):
                e = doubts[i, k]
                chosen[i, e] = cheapest(e, price, far_cost[i], hbm_cost[i], n_bytes[i])
                total += n_bytes[i, e, chosen[i, e]] if chosen[i, e] >= 0 else 0.0
        fits = total <= budget
        settled = total
        for i in range(first, last):
            known = above[i] if fits else below[i]
            n_doubts[i] = doubted(doubts[i], n_doubts[i], known, chosen[i], below[i], above[i])
            for k in range(n_doubts[i]):
                e = doubts[i, k]
                settled -= n_bytes[i, e, chosen[i, e]] if chosen[i, e] >= 0 else 0.0
        if fits:
            high = middle
            if step == 0:
                break
        else:
            low = middle
    left = budget - settled
    for i in range(first, last):
        for k in range(n_doubts[i]):
            e = doubts[i, k]
            price = max(high, least[i])
            chosen[i, e] = cheapest(e, price, far_cost[i], hbm_cost[i], n_bytes[i])
            left -= n_bytes[i, e, chosen[i, e]] if chosen[i, e] >= 0 else 0.0
    for i in range(first, last):  # what a lower price would buy, while there is room
        for k in range(n_doubts[i]):
            e = doubts[i, k]
            index = cheapest(e, max(low, least[i]), far_cost[i], hbm_cost[i], n_bytes[i])
            now = chosen[i, e]
            if index != now and index >= 0:
                extra = n_bytes[i, e, index] - (n_bytes[i, e, now] if now >= 0 else 0.0)
                if extra <= left:
                    left -= extra
                    chosen[i, e] = index
    return left


@njit(cache=True, nogil=True)
def price(n, actions, forecast, held, prices, table, in_place, costs, seconds, far_index, factor):  # type: ignore[no-untyped-def]
    """Fill ``costs``, ``seconds``, ``far_index`` and ``factor`` for lane ``n``; see `decide`.

    Returns:
        The byte price above which nothing is worth a place in HBM.
    """
    load, active, _ = forecast
    present, wanted = held
    rate, lost, has_plan = prices
    widths, w_bytes, index_of = table[0], table[1], table[2]
    gpu_w, far_w, copy_w, far_token = table[3][n], table[5][n], table[6][n], table[7][n]
    least_tokens, window, _ = table[9]
    far_cost, hbm_cost, n_bytes = costs
    gpu_s, far_s, _ = seconds
    n_layers, n_experts, nb = hbm_cost.shape
    top_price = 1e-30
    for layer in range(n_layers):
        a = actions[n, layer]
        factor[layer] = 2.0 ** a[FAR_VALUE]
        second = rate[n] * 2.0 ** a[PRICE]
        copy_price = second * 0.05 * 16.0 ** a[HYSTERESIS] / window * has_plan[n]
        for e in range(n_experts):
            use = active[n, layer, e]
            tokens = max(load[n, layer, e] / max(use, 1e-12), least_tokens)
            best = np.inf
            for b in range(nb):
                if in_place:
                    one = use * max(far_w[b], tokens * far_token[b])
                else:
                    one = use * (copy_w[b] + gpu_w[b])
                cost = second * one + lost[n, layer, e, b]
                if cost < best:
                    best, far_index[layer, e], far_s[layer, e] = cost, b, one
            best += second * (factor[layer] - 1) * far_s[layer, e]
            far_cost[layer, e] = best
            here, ordered = present[n, layer, e], wanted[n, layer, e]
            for b in range(nb):
                gpu_s[layer, e, b] = use * gpu_w[b]
                paid = widths[b] in (here, ordered)
                cost = lost[n, layer, e, b] + (0.0 if paid else copy_price * copy_w[b])
                # beside a slower far device GPU seconds are all but free; fetches come in series
                cost += second * gpu_s[layer, e, b] * (0.1 if in_place else 1.0)
                hbm_cost[layer, e, b] = cost
                n_bytes[layer, e, b] = w_bytes[b]
                if here > 0:
                    n_bytes[layer, e, b] = max(w_bytes[b], w_bytes[index_of[here]])
                top_price = max(top_price, (best - cost) / n_bytes[layer, e, b])
    return top_price


@njit(cache=True, nogil=True)
def decide(
    lanes, actions, forecast, held, rations, prices, table, in_place, tier, bits, order, used
):  # type: ignore[no-untyped-def]
    """Fill tier, bits and order [N, L, E] with the plans behind ``actions`` [N, L, 4].

    Args:
        lanes: first and last + 1 of those to fill.
        actions: numbers in [-1, 1].
        forecast: load, active [N, L, E], and expected tokens per step [N].
        held: bits present in HBM and bits wanted by the last plan [N, L, E]; copies of either
            are paid already, and the budget charges what is present.
        rations: [N, L] HBM bytes of each layer, what one leaves goes to the next; or [N, 1] bytes
            for which the layers compete by one price.
        prices: 1 / expected step seconds [N], reward lost by each copy [N, L, E, NB], and whether
            a plan has been loaded, so that copies cost something, [N].
        table: widths, bytes and index by width [NB]; gpu, launch, far and copy seconds and far
            seconds per token [N, NB]; (GPU token, link latency, activation, floor) [N] each; and
            (least far tokens, window, top-k).
        in_place: whether the far device computes.
        tier: filled.
        bits: filled.
        order: filled, higher moves first.
        used: [N, L] filled, HBM bytes charged to each layer.
    """
    load, active, n_tokens = forecast
    widths, top_k = table[0], table[9][2]
    token_s, latency_s, activation_s, floor_s = table[8]
    n_layers, n_experts = load.shape[1:]
    each, wide = (n_layers, n_experts), (n_layers, n_experts, widths.size)
    far_cost, hbm_cost, n_bytes = np.empty(each), np.empty(wide), np.empty(wide)
    costs = far_cost, hbm_cost, n_bytes
    gpu_s, far_s = np.empty(wide), np.empty(each)
    far_index, chosen = np.empty(each, np.int64), np.empty(each, np.int64)
    factor, least = np.empty(n_layers), np.empty(n_layers)
    room = (
        np.empty(each, np.int64), np.empty(each, np.int64), np.empty(each, np.int64),
        np.empty(each, np.int64),
    )  # fmt: skip
    for n in range(lanes[0], lanes[1]):
        seconds = gpu_s, far_s, table[4][n]
        top_price = price(
            n, actions, forecast, held, prices, table, in_place, costs, seconds, far_index, factor
        )
        least[:] = top_price * 1e-6
        if in_place:  # the two sides work at once: HBM is filled while that helps the slower one
            for layer in range(n_layers):
                least[layer] = balanced_price(
                    layer, top_price, costs, seconds, (load[n], active[n], factor),
                    (token_s[n], latency_s[n], activation_s[n], floor_s[n], n_tokens[n], top_k),
                    room,
                )  # fmt: skip
        if rations.shape[1] == n_layers:
            left = 0.0
            for layer in range(n_layers):
                budget = rations[n, layer] + left
                left = settle((layer, layer + 1), least, costs, budget, top_price, chosen, room)
        else:
            settle((0, n_layers), least, costs, rations[n, 0], top_price, chosen, room)
        for layer in range(n_layers):
            used[n, layer] = 0.0
            for e in range(n_experts):
                index = chosen[layer, e]
                is_hot = index >= 0
                tier[n, layer, e] = 0 if is_hot else 1
                bits[n, layer, e] = widths[index if is_hot else far_index[layer, e]]
                gain = far_cost[layer, e] - hbm_cost[layer, e, index] if is_hot else 0.0
                used[n, layer] += n_bytes[layer, e, index] if is_hot else 0.0
                order[n, layer, e] = gain / n_bytes[layer, e, index] if is_hot else -1.0
