"""Compiled loops of `ndp_gym.allocation`: one filling per layer, all of them within the budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

_BISECTIONS = 20
_FILL_STEPS = 32


_LOOP: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
_INNER = {**_LOOP, "cache": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Called by loops of this file alone: half the time to compile."""


@njit(**_LOOP)
def within_budget(objective, n_bytes, budget_bytes):  # type: ignore[no-untyped-def]
    """The best filling per layer under the least byte price that keeps the budget.

    Returns:
        [L] columns of ``objective`` and ``n_bytes`` [L, X], and the price.
    """
    n_layers, n_ways = objective.shape
    left, n_left = np.empty((n_layers, n_ways), np.int64), np.empty(n_layers, np.int64)
    # Bytes chosen at a price that fits and at one that does not: all later choices lie between.
    fits, exceeds = np.empty(n_layers), np.empty(n_layers)
    least, most, smallest = np.inf, -np.inf, np.inf
    for layer in range(n_layers):
        n_left[layer], fits[layer], exceeds[layer] = n_ways, -np.inf, np.inf
        for way in range(n_ways):
            left[layer, way] = way
            least, most = min(least, objective[layer, way]), max(most, objective[layer, way])
            if 0 < n_bytes[layer, way] < smallest:
                smallest = n_bytes[layer, way]
    chosen = np.empty(n_layers, np.int64)
    high = 2 * (most - least) / smallest  # above it nothing is worth its bytes
    low = high * 1e-6
    for step in range(_BISECTIONS + 2):
        price = math.sqrt(low * high) if step > 0 else 0.0
        if step > _BISECTIONS:
            price = high
        used = _choose(chosen, price, objective, n_bytes, left, n_left, fits, exceeds)
        if used > budget_bytes:
            low = price if step > 0 else low
        elif step > 0:
            high = price
        else:
            return chosen, 0.0
        bound = exceeds if used > budget_bytes else fits
        for layer in range(n_layers):
            bound[layer] = n_bytes[layer, chosen[layer]]
    _fill_up(chosen, objective, n_bytes, budget_bytes)
    return chosen, high


@njit(**_LOOP)
def within_rations(objective, n_bytes, rations, budget_bytes):  # type: ignore[no-untyped-def]
    """[L] columns, see `ndp_gym.allocation.within_rations`."""
    n_layers, n_ways = objective.shape
    used = 0.0  # sums of whole numbers are exact
    for layer in range(n_layers):
        used += rations[layer]
    left, chosen = budget_bytes - used, np.zeros(n_layers, np.int64)
    for layer in range(n_layers):
        room, least = rations[layer] + left, np.inf
        for way in range(n_ways):
            if n_bytes[layer, way] <= room and objective[layer, way] < least:
                least, chosen[layer] = objective[layer, way], way
        left = room - n_bytes[layer, chosen[layer]]
    return chosen


@njit(**_INNER)
def _choose(chosen, price, objective, n_bytes, left, n_left, fits, exceeds):  # type: ignore[no-untyped-def]
    """Fill ``chosen`` with the best of the columns ``left``, dropping those of bytes out of range.

    Returns:
        Bytes of all layers.
    """
    used = 0.0
    for layer in range(chosen.size):
        low, high = min(fits[layer], exceeds[layer]), max(fits[layer], exceeds[layer])
        least, best, kept = np.inf, 0, 0
        for k in range(n_left[layer]):
            way = left[layer, k]
            size = n_bytes[layer, way]
            if low <= size <= high:
                left[layer, kept] = way
                kept += 1
                value = objective[layer, way] + price * size
                if value < least:
                    least, best = value, way
        n_left[layer], chosen[layer] = kept, best
        used += n_bytes[layer, best]
    return used


@njit(**_INNER)
def _fill_up(chosen, objective, n_bytes, budget_bytes):  # type: ignore[no-untyped-def]
    """Spend what the common price left over: the layer that gains most takes it, and again."""
    n_layers, n_ways = objective.shape
    candidate, stale = np.empty(n_layers, np.int64), np.empty(n_layers, np.bool_)
    used = 0.0  # sums of whole numbers are exact
    for layer in range(n_layers):
        used += n_bytes[layer, chosen[layer]]
        candidate[layer], stale[layer] = chosen[layer], True
    for _ in range(_FILL_STEPS):
        top, taker = 0.0, -1
        for layer in range(n_layers):
            room = n_bytes[layer, chosen[layer]] + (budget_bytes - used)
            if stale[layer] or n_bytes[layer, candidate[layer]] > room:
                least = np.inf
                for way in range(n_ways):
                    if n_bytes[layer, way] <= room and objective[layer, way] < least:
                        least, candidate[layer] = objective[layer, way], way
                stale[layer] = False
            gain = objective[layer, chosen[layer]] - objective[layer, candidate[layer]]
            if gain > top:
                top, taker = gain, layer
        if taker < 0:
            break
        more = n_bytes[taker, candidate[taker]] - n_bytes[taker, chosen[taker]]
        chosen[taker] = candidate[taker]
        used += more
        if more < 0:
            for layer in range(n_layers):
                stale[layer] = True


@njit(**_LOOP)
def target(chosen, bits_of, n_bytes, index, gain, ranking):  # type: ignore[no-untyped-def]
    """[L, E] bits, value and value of copies present, see `ndp_gym.allocation.Target`.

    ``chosen`` [L] are flat indices into (C, E + 1), ``bits_of`` the widths by index; the others are
    `ndp_gym.fillings.Items`.
    """
    n_rankings, n_layers, n_experts = gain.shape
    bits = np.zeros((n_layers, n_experts), np.int64)
    value, present_value = np.empty(bits.shape), np.empty(bits.shape)
    for layer in range(n_layers):
        c, count = chosen[layer] // (n_experts + 1), chosen[layer] % (n_experts + 1)
        for k in range(count):
            e = ranking[c, layer, k]
            bits[layer, e] = bits_of[index[c, layer, e]]
        for e in range(n_experts):
            value[layer, e] = gain[c, layer, e] / n_bytes[c, layer, e]
            held = n_rankings - 1
            present_value[layer, e] = gain[held, layer, e] / n_bytes[held, layer, e]
    return bits, value, present_value
