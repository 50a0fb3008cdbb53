"""Choose among fillings: one per layer within the budget, far widths to match, moves in stages."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.fillings import Fillings

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FAR_SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)
"""Shares of the far device in a layer's time that are tried when its widths are bought."""


@cache
def _compiled() -> tuple[ModuleType, ModuleType]:
    """The modules that bring numba: `ndp_gym.allocation_loops` and `ndp_gym.filling_loops`."""
    return import_module("ndp_gym.allocation_loops"), import_module("ndp_gym.filling_loops")


def within_budget(options: Fillings, budget_bytes: float) -> tuple[IntArray, float]:
    """The best filling per layer under the smallest byte price that keeps the budget.

    Returns:
        [L] flat indices into (C, E + 1), and the price.
    """
    loops, _ = _compiled()
    chosen, price = loops.within_budget(*_ways(options), float(budget_bytes))
    return chosen, price


def within_rations(options: Fillings, rations: FloatArray, budget_bytes: float) -> IntArray:
    """[L] the best filling of each layer within its bytes; what one leaves goes to the next."""
    loops, _ = _compiled()
    chosen: IntArray = loops.within_rations(*_ways(options), rations, float(budget_bytes))
    return chosen


def _ways(options: Fillings) -> tuple[FloatArray, FloatArray]:
    """[L, C * (E + 1)] objective and bytes."""
    flat = len(options.objective), -1
    return options.objective.reshape(flat), options.n_bytes.reshape(flat)


def far_widths(options: Fillings, chosen: IntArray) -> tuple[FloatArray, IntArray]:
    """Widths outside HBM, given what is in it: wider where the GPU is the slower side anyway.

    Returns:
        [L] the far device's share in the layer's time under which widths were bought, and [L, E]
        width indices.
    """
    _, loops = _compiled()
    items, given = options.items, options.packed
    shares = FAR_SHARES if given.constants[loops.OVERLAP] >= 0 else FAR_SHARES[:1]
    share, index = loops.buy_far(
        *given, np.array(shares), chosen, options.gpu_s, items.ranking, items.hbm_index
    )
    return share, index


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
    loops, _ = _compiled()
    return Target(*loops.target(chosen, table.bits, *options.items))


def stage(
    table: CostTable, target: Target, present: IntArray, budget_bytes: float, can_arrive: float
) -> Target:
    """The part of ``target`` that the link can bring in time; copies stay until they are replaced.

    ``transition`` demotes at once and promotes as the link allows: whatever is demoted for a
    promotion that cannot arrive yet is lost for nothing.
    """
    _, loops = _compiled()
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
