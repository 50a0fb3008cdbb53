"""Choose among fillings: one per layer within the budget, far widths to match, moves in stages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.fillings import (
    Fillings,
    Prices,
    Window,
    far_seconds,
    layer_seconds,
    per_layer,
    variance,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_BISECTIONS = 20
_FILL_STEPS = 32
FAR_SHARES = (1.0, 0.5, 0.2, 0.05, 0.0)
"""Shares of the far device in a layer's time that are tried when its widths are bought."""


def within_budget(options: Fillings, budget_bytes: float) -> tuple[IntArray, float]:
    """The best filling per layer under the smallest byte price that keeps the budget.

    Returns:
        [L] flat indices into (C, E + 1), and the price.
    """
    n_layers = len(options.objective)
    objective = options.objective.reshape(n_layers, -1)
    n_bytes = options.n_bytes.reshape(n_layers, -1)

    def best(price: float) -> IntArray:
        index: IntArray = (objective + price * n_bytes).argmin(axis=1)
        return index

    chosen = best(0.0)
    if at(n_bytes, chosen).sum() <= budget_bytes:
        return chosen, 0.0
    # Above the highest price nothing is worth its bytes.
    high = 2 * float(np.ptp(objective)) / float(n_bytes[n_bytes > 0].min())
    low = high * 1e-6
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if at(n_bytes, best(middle)).sum() <= budget_bytes:
            high = middle
        else:
            low = middle
    return _fill_up(objective, n_bytes, best(high), budget_bytes), high


def _fill_up(
    objective: FloatArray, n_bytes: FloatArray, chosen: IntArray, budget_bytes: float
) -> IntArray:
    """Spend what the common price left over: the layer that gains most takes it, and again."""
    chosen = chosen.copy()
    for _ in range(_FILL_STEPS):
        used = at(n_bytes, chosen)
        room = used + (budget_bytes - used.sum())
        reachable = np.where(n_bytes <= room[:, None], objective, np.inf)
        candidate = reachable.argmin(axis=1)
        gains = at(objective, chosen) - at(objective, candidate)
        layer = int(gains.argmax())
        if not gains[layer] > 0:
            break
        chosen[layer] = candidate[layer]
    return chosen


def far_widths(
    window: Window, prices: Prices, options: Fillings, chosen: IntArray
) -> tuple[FloatArray, IntArray]:
    """Widths outside HBM, given what is in it: wider where the GPU is the slower side anyway.

    Returns:
        [L] the far device's share in the layer's time under which widths were bought, and [L, E]
        width indices.
    """
    expected, items, rows = window.expected, options.items, np.arange(len(chosen))
    ranking, is_hot = _hot(options, chosen)
    cold = ~is_hot
    layers = per_layer(prices, len(chosen))
    far_s = layers.far_factor[:, None, None] * far_seconds(window.table, window.in_place, expected)
    gpu_var = (variance(items.gpu_s[ranking, rows], expected) * is_hot).sum(-1)
    hot_load = (expected.load * is_hot).sum(-1)
    shares = np.array(FAR_SHARES if window.in_place else FAR_SHARES[:1])
    far_price = (shares[:, None] * layers.second)[..., None, None]
    widths = (far_price * far_s + window.lost).argmin(-1)
    experts = np.arange(cold.size).reshape(cold.shape) * far_s.shape[-1] + widths
    seconds, loss = far_s.ravel()[experts] * cold, window.lost.ravel()[experts] * cold
    spread = gpu_var + variance(seconds, expected).sum(-1)
    total = layer_seconds(window, at(options.gpu_s, chosen), seconds.sum(-1), spread, hot_load)
    best = (layers.second * total + loss.sum(-1)).argmin(0)  # [L]; the first of equals
    return shares[best], widths[best, rows]


def _hot(options: Fillings, chosen: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """[L] chosen rankings, and [L, E] whether the expert is in HBM."""
    n_counts = options.objective.shape[-1]
    ranking, count = chosen // n_counts, chosen % n_counts
    place = options.items.ranking[ranking, np.arange(len(chosen))].argsort(axis=1)
    return ranking, place < count[:, None]


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
    value = items.gain / items.n_bytes
    return Target(
        bits=np.where(is_hot, table.bits[items.hbm_index[ranking, rows]], 0),
        value=value[ranking, rows],
        present_value=value[-1],
    )


def stage(
    table: CostTable, target: Target, present: IntArray, budget_bytes: float, can_arrive: float
) -> Target:
    """The part of ``target`` that the link can bring in time; copies stay until they are replaced.

    ``transition`` demotes at once and promotes as the link allows: whatever is demoted for a
    promotion that cannot arrive yet is lost for nothing.
    """
    sizes = np.concatenate([[0], table.weight_bytes])
    new, old = (sizes[np.where(b > 0, table.index_of[b], -1) + 1] for b in (target.bits, present))
    moving = (target.bits > 0) & (target.bits != present)
    # A copy longer than the cap still goes: it arrives in a later window.
    goes = _first(moving, target.value, new, max(can_arrive, float(sizes.max())))
    waits = moving & ~goes
    bits = np.where(waits, present, target.bits)
    charged = np.where(bits > 0, np.maximum(old, np.where(waits, 0, new)), 0)
    stale = (present > 0) & (bits == 0) & (target.present_value > 0)
    stays = _first(stale, target.present_value, old, budget_bytes - float(charged.sum()))
    value = np.where(stays | (waits & (present > 0)), target.present_value, target.value)
    return target._replace(bits=np.where(stays, present, bits), value=value)


def _first(
    among: NDArray[np.bool_], value: FloatArray, n_bytes: IntArray, room: float
) -> NDArray[np.bool_]:
    """The entries of ``among`` of highest value whose bytes together fit ``room``."""
    order = np.argsort(np.where(among, -value, np.inf), axis=None, kind="stable")
    fits = np.cumsum(np.where(among, n_bytes, 0).ravel()[order]) <= room
    picked = np.zeros(among.size, dtype=np.bool_)
    picked[order] = fits
    return picked.reshape(among.shape) & among


def at(values: FloatArray, chosen: IntArray) -> FloatArray:
    """Entries of ``values`` [L, ...] at one flat index per layer."""
    picked: FloatArray = values.reshape(len(chosen), -1)[np.arange(len(chosen)), chosen]
    return picked
