"""Compiled loops of `ndp_gym.bound`: the cheapest way to serve each expert at given prices.

A *pair* is an expert in a decode step that routes to it; pairs are sorted by expert, then step, and
``starts[i]:starts[i + 1]`` are those of the i-th expert. A *way* of serving a pair is the width
index of a copy in HBM, ``NB +`` the index of one on the far device, or ``2 NB +`` the index of one
copied for this step only. Level 0 occupies no HBM all window long, level ``1 + b`` occupies W(b).
"""

from __future__ import annotations

import numpy as np
from numba import njit

IN_PLACE, BALANCE, FETCH = range(3)


@njit(cache=True, nogil=True)
def waiting_costs(costs, kind):  # type: ignore[no-untyped-def]
    """[P, NB] cost of a pair outside HBM at the width it is planned at, and [P, NB] the way."""
    n_pairs, n_ways = costs.shape
    nb = n_ways // 3
    cost, way = np.empty((n_pairs, nb)), np.empty((n_pairs, nb), np.int64)
    for p in range(n_pairs):
        for b in range(nb):
            far, copied = costs[p, nb + b], costs[p, 2 * nb + b]
            is_far = kind == IN_PLACE or (kind == BALANCE and far <= copied)
            cost[p, b] = far if is_far else copied
            way[p, b] = nb + b if is_far else 2 * nb + b
        if kind == FETCH:  # any width may be fetched in any step
            best = 0
            for b in range(nb):
                if cost[p, b] < cost[p, best]:
                    best = b
            cost[p, :], way[p, :] = cost[p, best], way[p, best]
    return cost, way


@njit(cache=True, nogil=True)
def _arrival(before, way_before, costs, first, last, b, ways):  # type: ignore[no-untyped-def]
    """Least cost of pairs ``first..last-1`` served as ``before`` says, from some step on in HBM.

    Fills ``ways`` if it is not empty.
    """
    total = 0.0
    for p in range(first, last):
        total += costs[p, b]
    best, at = total, first
    for p in range(first, last):
        total += before[p - first] - costs[p, b]
        if total < best:
            best, at = total, p + 1
    if ways.size > 0:
        for p in range(first, last):
            ways[p] = way_before[p - first] if p < at else b
    return best


@njit(cache=True, nogil=True)
def pinned(costs, waiting, way, first, last, level, ways):  # type: ignore[no-untyped-def]
    """Least cost of an expert that occupies W(``level``), with the ways of the best if asked for.

    It waits elsewhere at one width, or in HBM at another width, until its copy arrives; the wider
    of the two copies is what it occupies.
    """
    nb = costs.shape[1] // 3
    n = last - first
    before, way_before = np.empty(n), np.empty(n, np.int64)
    nothing = np.empty(0, np.int64)
    best, best_old, best_new = np.inf, 0, level
    for old in range(2 * nb):
        in_hbm = old >= nb
        b = old - nb if in_hbm else old
        if in_hbm and b < level:  # widths descend: a wider copy occupies more
            continue
        for p in range(n):
            before[p] = costs[first + p, b] if in_hbm else waiting[first + p, b]
        for new in range(level, nb if in_hbm and b == level else level + 1):
            found = _arrival(before, way_before, costs, first, last, new, nothing)
            if found < best:
                best, best_old, best_new = found, old, new
    if ways.size > 0:
        b = best_old - nb if best_old >= nb else best_old
        for p in range(n):
            before[p] = costs[first + p, b] if best_old >= nb else waiting[first + p, b]
            way_before[p] = b if best_old >= nb else way[first + p, b]
        _arrival(before, way_before, costs, first, last, best_new, ways)
    return best


@njit(cache=True, nogil=True)
def unpinned(costs, waiting, way, first, last, ways):  # type: ignore[no-untyped-def]
    """Least cost of an expert that stays outside HBM at one width."""
    nb = costs.shape[1] // 3
    best, at = np.inf, 0
    for b in range(nb):
        total = 0.0
        for p in range(first, last):
            total += waiting[p, b]
        if total < best:
            best, at = total, b
    if ways.size > 0:
        for p in range(first, last):
            ways[p] = way[p, at]
    return best


@njit(cache=True, nogil=True)
def cached(costs, step, hold, first, last, ways):  # type: ignore[no-untyped-def]
    """Least cost of an expert that is fetched and may be cached; ``hold`` [NB] per step kept.

    A hit in step t was kept since the step it was copied in, or since before the window -> cost,
    steps it was kept times its width's share, by width [NB].
    """
    nb = costs.shape[1] // 3
    n = last - first
    value = np.zeros(nb)
    is_kept = np.zeros((n, nb), np.bool_)
    source = np.zeros(n, np.int64)
    before = -1
    for i in range(n):
        p = first + i
        base, at = np.inf, 0
        for b in range(nb):
            if value[b] < base:
                base, at = value[b], b
        source[i] = at
        for b in range(nb):
            kept = value[b] + hold[b] * (step[p] - before)
            copied = base + costs[p, 2 * nb + b] - costs[p, b]
            is_kept[i, b] = kept <= copied
            value[b] = min(kept, copied) + costs[p, b]
        before = step[p]
    b = int(np.argmin(value))
    best = value[b]
    held = np.zeros(nb)
    for i in range(n - 1, -1, -1):
        p = first + i
        if ways.size > 0:
            ways[p] = b if is_kept[i, b] else 2 * nb + b
        if is_kept[i, b]:
            held[b] += step[p] - (step[p - 1] if i > 0 else -1)
        else:
            b = source[i]
    return best, held


@njit(cache=True, nogil=True)
def level_costs(costs, waiting, way, starts):  # type: ignore[no-untyped-def]
    """[X, 1 + NB] least cost of every expert by the HBM it occupies all window long."""
    nb, n = costs.shape[1] // 3, starts.size - 1
    nothing = np.empty(0, np.int64)
    table = np.empty((n, nb + 1))
    for i in range(n):
        first, last = starts[i], starts[i + 1]
        table[i, 0] = unpinned(costs, waiting, way, first, last, nothing)
        for level in range(nb):
            table[i, 1 + level] = pinned(costs, waiting, way, first, last, level, nothing)
    return table


@njit(cache=True, nogil=True)
def choose(table, sizes, byte_price, costs, step, starts, kind, n_steps, levels):  # type: ignore[no-untyped-def]
    """Fill ``levels`` [X] at a price per HBM byte -> total cost without the budget, bytes occupied.

    With service "fetch" level 0 may cache, which is priced by the share of steps it keeps a copy.
    """
    nb = sizes.size
    hold = byte_price * sizes / n_steps
    nothing = np.empty(0, np.int64)
    total, occupied = 0.0, 0.0
    for i in range(table.shape[0]):
        best, used, levels[i] = table[i, 0], 0.0, 0
        if kind == FETCH:
            best, held = cached(costs, step, hold, starts[i], starts[i + 1], nothing)
            used = (held * sizes).sum() / n_steps
        for b in range(nb):
            cost = table[i, 1 + b] + byte_price * sizes[b]
            if cost < best:
                best, used, levels[i] = cost, sizes[b], 1 + b
        total += best
        occupied += used
    return total, occupied


@njit(cache=True, nogil=True)
def fill_ways(levels, costs, waiting, way, step, starts, kind, hold, ways):  # type: ignore[no-untyped-def]
    """Fill ``ways`` [P] with how each pair is served when experts occupy ``levels``."""
    for i in range(levels.size):
        first, last = starts[i], starts[i + 1]
        if levels[i] > 0:
            pinned(costs, waiting, way, first, last, levels[i] - 1, ways)
        elif kind == FETCH:
            cached(costs, step, hold, first, last, ways)
        else:
            unpinned(costs, waiting, way, first, last, ways)


@njit(cache=True, nogil=True)
def price_pairs(seconds, loss, cell, near, far, launch_share, far_share, fixed, launch_s):  # type: ignore[no-untyped-def]
    """[P, 3 NB] cost of every way: nats of loss, and seconds at the price of their side.

    ``seconds`` [P, 3 NB]; ``near``, ``far``: [C] price of a second on the GPU's and the far
    device's side in each cell (step, layer); ``fixed`` [C] price of using the far device at all,
    of which each pair bears ``far_share`` [P]; of a launch it bears ``launch_share`` [P, NB].
    """
    nb = launch_s.size
    costs = np.empty((cell.size, 3 * nb))
    for p in range(cell.size):
        c = cell[p]
        for b in range(nb):
            launch = launch_share[p, b] * launch_s[b]
            costs[p, b] = loss[p, b] + near[c] * (seconds[p, b] + launch)
            costs[p, nb + b] = loss[p, b] + far[c] * seconds[p, nb + b] + fixed[c] * far_share[p]
            costs[p, 2 * nb + b] = loss[p, b] + near[c] * (seconds[p, 2 * nb + b] + launch)
    return costs


@njit(cache=True, nogil=True)
def use_of(ways, seconds, cell, launch_share, far_share, launch_s, n_cells):  # type: ignore[no-untyped-def]
    """Seconds of both sides by cell, and how many pairs use each launch and the far device.

    Returns:
        near [C], far [C] (without fixed costs), share of the fixed cost borne [C], pairs on the
        GPU at each width [C, NB], pairs on the far device [C].
    """
    nb = launch_s.size
    near, far, borne = np.zeros(n_cells), np.zeros(n_cells), np.zeros(n_cells)
    on_gpu, on_far = np.zeros((n_cells, nb), np.int64), np.zeros(n_cells, np.int64)
    for p in range(ways.size):
        c, w = cell[p], ways[p]
        if nb <= w < 2 * nb:
            far[c] += seconds[p, w]
            borne[c] += far_share[p]
            on_far[c] += 1
        else:
            b = w if w < nb else w - 2 * nb
            near[c] += seconds[p, w] + launch_share[p, b] * launch_s[b]
            on_gpu[c, b] += 1
    return near, far, borne, on_gpu, on_far


@njit(cache=True, nogil=True)
def move_shares(ways, cell, rate, on_gpu, on_far, launch_share, far_share):  # type: ignore[no-untyped-def]
    """Let the pairs that use a launch, or the far device, bear a larger share of its cost."""
    nb = launch_share.shape[1]
    for p in range(ways.size):
        c, w = cell[p], ways[p]
        is_far = nb <= w < 2 * nb
        used = -1 if is_far else (w if w < nb else w - 2 * nb)
        if on_far[c] > 0:
            target = 1.0 / on_far[c] if is_far else 0.0
            far_share[p] += rate * (target - far_share[p])
        for b in range(nb):
            if on_gpu[c, b] > 0:
                target = 1.0 / on_gpu[c, b] if used == b else 0.0
                launch_share[p, b] += rate * (target - launch_share[p, b])
