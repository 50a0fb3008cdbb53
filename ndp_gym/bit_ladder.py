"""Bitwidth search of the seed paper (arXiv 2512.04476): widths by importance at a given average."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def bit_ladder(loss: FloatArray, menu: NDArray[np.int64], average: float) -> NDArray[np.int64]:
    """Widths [L, N] of experts in order of importance that avoid most loss at ``average`` bits.

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
