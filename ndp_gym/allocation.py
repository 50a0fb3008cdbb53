"""Choose among fillings: one per layer within the budget, far widths to match, moves in stages."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.fillings import Fillings, Prices, Window, packed

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FAR_SHARES = (1.0, 0.5, 0.2, 0.05, 0.0)
"""Shares of the far device in a layer's time that are tried when its widths are bought."""


def within_budget(options: Fillings, budget_bytes: float) -> tuple[IntArray, float]:
    """The best filling per layer under the smallest byte price that keeps the budget.

    Returns:
        [L] flat indices into (C, E + 1), and the price.
    """
    loops = import_module("ndp_gym.allocation_loops")  # numba comes with it
    n_layers = len(options.objective)
    objective = options.objective.reshape(n_layers, -1)
    n_bytes = options.n_bytes.reshape(n_layers, -1)
    chosen, price = loops.within_budget(objective, n_bytes, float(budget_bytes))
    return chosen, price


def within_rations(options: Fillings, rations: FloatArray, budget_bytes: float) -> IntArray:
    """[L] the best filling of each layer within its bytes; what one leaves goes to the next."""
    n_layers = len(rations)
    objective = options.objective.reshape(n_layers, -1)
    n_bytes = options.n_bytes.reshape(n_layers, -1)
    left = budget_bytes - float(rations.sum())
    chosen = np.empty(n_layers, np.int64)
    for layer in range(n_layers):
        room = rations[layer] + left
        chosen[layer] = np.where(n_bytes[layer] <= room, objective[layer], np.inf).argmin()
        left = room - n_bytes[layer, chosen[layer]]
    return chosen


def far_widths(
    window: Window, prices: Prices, options: Fillings, chosen: IntArray
) -> tuple[FloatArray, IntArray]:
    """Widths outside HBM, given what is in it: wider where the GPU is the slower side anyway.

    Returns:
        [L] the far device's share in the layer's time under which widths were bought, and [L, E]
        width indices.
    """
    loops = import_module("ndp_gym.filling_loops")  # numba comes with it
    items = options.items
    shares = FAR_SHARES if window.in_place else FAR_SHARES[:1]
    share, index = loops.buy_far(
        *packed(window, prices), np.array(shares), chosen, options.gpu_s, items.ranking,
        items.hbm_index,
    )  # fmt: skip
    return share, index


def _hot(options: Fillings, chosen: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """[L] chosen rankings, and [L, E] whether the expert is in HBM."""
    n_counts = options.objective.shape[-1]
    ranking, count = chosen // n_counts, chosen % n_counts
    rows = np.arange(len(chosen))
    order = options.items.ranking[ranking, rows]
    is_hot = np.empty(order.shape, dtype=np.bool_)
    is_hot[rows[:, None], order] = np.arange(n_counts - 1) < count[:, None]
    return ranking, is_hot


def keep_or_change(
    options: Fillings, chosen: IntArray, held: IntArray, budget_bytes: float, min_gain: float
) -> IntArray:
    """``chosen``, or exactly the copies held now where changing them does not gain ``min_gain``."""
    if not held.any():
        return chosen
    _, n_rankings, n_counts = options.objective.shape
    same = (n_rankings - 1) * n_counts + (held > 0).sum(axis=1)
    fits = at(options.n_bytes, same).sum() <= budget_bytes
    gain = float((at(options.objective, same) - at(options.objective, chosen)).sum())
    return same if fits and gain < min_gain else chosen


class Target(NamedTuple):
    """[L, E] HBM widths (0 = far), the objective a copy saves per byte, and that of one present."""

    bits: IntArray
    value: FloatArray
    present_value: FloatArray


def target_of(table: CostTable, options: Fillings, chosen: IntArray) -> Target:
    """The chosen fillings as widths and values per byte."""
    items, rows = options.items, np.arange(len(chosen))
    ranking, is_hot = _hot(options, chosen)
    return Target(
        bits=np.where(is_hot, table.bits[items.hbm_index[ranking, rows]], 0),
        value=items.gain[ranking, rows] / items.n_bytes[ranking, rows],
        present_value=items.gain[-1] / items.n_bytes[-1],
    )


def stage(
    table: CostTable, target: Target, present: IntArray, budget_bytes: float, can_arrive: float
) -> Target:
    """The part of ``target`` that the link can bring in time; copies stay until they are replaced.

    ``transition`` demotes at once and promotes as the link allows: whatever is demoted for a
    promotion that cannot arrive yet is lost for nothing.
    """
    loops = import_module("ndp_gym.filling_loops")  # numba comes with it
    bytes_of = np.zeros(len(table.index_of), dtype=np.int64)
    bytes_of[table.bits] = table.weight_bytes
    # A copy longer than the cap still goes: it arrives in a later window.
    arriving = max(can_arrive, float(table.weight_bytes.max()))
    flat = (np.ascontiguousarray(values).ravel() for values in (*target, present))
    bits, value = loops.stage(*flat, bytes_of, float(budget_bytes), arriving)
    return target._replace(bits=bits.reshape(present.shape), value=value.reshape(present.shape))


def at(values: FloatArray, chosen: IntArray) -> FloatArray:
    """Entries of ``values`` [L, ...] at one flat index per layer."""
    picked: FloatArray = values.reshape(len(chosen), -1)[np.arange(len(chosen)), chosen]
    return picked
