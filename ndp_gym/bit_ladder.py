"""Searches for the widths of a layer's experts at a given average: the seed paper's, MC-MoE's."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def bit_ladder(loss: FloatArray, menu: NDArray[np.int64], average: float) -> NDArray[np.int64]:
    """Widths [L, N] of experts in order of importance that avoid most loss at ``average`` bits.

    The search of arXiv 2512.04476, where importance alone orders the widths.
    The first n_0 experts get ``menu[0]`` bits, the next n_1 ``menu[1]``, and so on, the rest the
    narrowest. As in the paper, the total is met exactly where widths are consecutive: the last but
    one width takes what the wider ones leave.

    Args:
        loss: [L, N, M] loss of each expert at each width of ``menu``.
        menu: [M] widths, descending.
        average: mean width; the total is rounded down.
    """
    n_layers, n_experts, _ = loss.shape
    gained = np.zeros((n_layers, n_experts + 1, len(menu)))
    gained[:, 1:] = np.cumsum(loss[..., -1:] - loss, axis=1)
    ends = _ladders(n_experts, menu - menu[-1], int(n_experts * max(average - menu[-1], 0)))
    starts = np.concatenate([np.zeros((len(ends), 1), np.int64), ends[:, :-1]], axis=1)
    width = np.arange(len(menu) - 1)
    total = (gained[:, ends, width] - gained[:, starts, width]).sum(axis=-1)  # [L, ladders]
    best = ends[total.argmax(axis=1)]  # [L, M - 1]
    steps = (np.arange(n_experts)[:, None] >= best[:, None, :]).sum(axis=-1)
    widths: NDArray[np.int64] = menu[steps]
    return widths


def exact_widths(loss: FloatArray, menu: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """[E] columns of ``menu`` with the least total loss, found by dynamic programming.

    The program of MC-MoE (arXiv 2410.06270): at least one expert gets each of the two widest.

    Args:
        loss: [E, M] loss of each expert at each width of ``menu``.
        menu: [M] widths, descending.
        budget: most that the widths may sum to; raised to what the two widest need.
    """
    n_experts, n_widths = loss.shape
    n_asked = min(2, n_widths - 1, n_experts)  # widths that must occur
    least = int(menu[:n_asked].sum() + (n_experts - n_asked) * menu[-1])
    budget = min(max(budget, least), int(n_experts * menu[0]))
    best = np.full((1 << n_asked, budget + 1), np.inf)  # [widths that occur, bits spent]
    best[0, 0] = 0.0
    chosen = np.zeros((n_experts, *best.shape, 2), dtype=np.int16)  # width, widths before
    for expert, row in enumerate(loss):
        last, best = best, np.full_like(best, np.inf)
        for had, column in product(range(len(best)), range(n_widths)):
            has = had | (1 << column if column < n_asked else 0)
            spent = np.full(budget + 1, np.inf)
            if (b := int(menu[column])) <= budget:
                spent[b:] = last[had, : budget + 1 - b] + row[column]
            better = spent < best[has]
            best[has, better] = spent[better]
            chosen[expert, has, better] = column, had
    has, left = len(best) - 1, int(best[-1].argmin())
    widths = np.zeros(n_experts, dtype=np.int64)
    for expert in range(n_experts - 1, -1, -1):
        widths[expert], has_before = chosen[expert, has, left]
        left, has = left - int(menu[widths[expert]]), int(has_before)
    return widths


def _ladders(n_experts: int, steps: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """[X, M - 1] ways to spend ``budget`` bits: the rank where each width but the last ends."""
    if len(steps) == 1:
        return np.zeros((1, 0), np.int64)
    ways: list[list[int]] = []

    def spend(ends: list[int], left: int) -> None:
        used, step = (ends[-1] if ends else 0), int(steps[len(ends)])
        if len(ends) == len(steps) - 2:
            count = left // step
            if used + count <= n_experts:
                ways.append([*ends, used + count])
            return
        for count in range(min(n_experts - used, left // step) + 1):
            spend([*ends, used + count], left - count * step)

    spend([], min(budget, n_experts * int(steps[0])))
    return np.array(ways, dtype=np.int64)
