"""How the ``balance`` planner may fill the HBM of each layer, and what each way should cost.

A *filling* of a layer is a prefix of a ranking of its experts. Cumulative sums evaluate every
prefix of every ranking at once. Seconds follow ``validation.md`` section 1 in expectation: active
experts are independent, and E max(G, N) uses the variance of G - N.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.forecast import Forecast

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

HELD_FIRST = 1e9


class Prices(NamedTuple):
    """Exchange rates into the objective (nats of log time), at which widths and experts are bought.

    Attributes:
        second: of a step's second.
        byte: of an HBM byte.
        copy_second: of a second of copying over the link.
        far_share: [L] what a second of the far device adds to the layer's time, 1 where it is the
            slower side; the GPU's second adds the rest.
        gpu_factor, far_factor: expected seconds are multiplied by these.
    """

    second: float
    byte: float
    copy_second: float
    far_share: FloatArray
    gpu_factor: float
    far_factor: float


class Items(NamedTuple):
    """What every expert costs in HBM, [C, L, E] for C rankings, and far, [L, E]."""

    gpu_s: FloatArray
    far_s: FloatArray
    hbm_loss: FloatArray
    far_loss: FloatArray
    move: FloatArray
    n_bytes: FloatArray
    hbm_index: IntArray
    far_index: IntArray
    gain: FloatArray
    ranking: IntArray


class Fillings(NamedTuple):
    """Cost of every prefix; [L, C, E + 1], the last axis is the number of experts in HBM.

    The last ranking puts the copies held first, at the width they have. ``far_share`` is what one
    more second of the far device would add to the layer's time.
    """

    objective: FloatArray
    seconds: FloatArray
    n_bytes: FloatArray
    far_share: FloatArray
    items: Items


def fillings(
    table: CostTable,
    in_place: bool,
    lost: FloatArray,
    expected: Forecast,
    wanted: IntArray,
    present: IntArray,
    prices: Prices,
    widths: IntArray,
) -> Fillings:
    """Every prefix of every ranking of every layer.

    Args:
        table: nominal costs.
        in_place: the far device computes; else every miss is fetched.
        lost: [L, E, NB] objective lost by serving the expert at that width, wherever it is.
        expected: routing of the window.
        wanted: [L, E] bits of copies that are in HBM or on their way, 0 = none.
        present: [L, E] bits of copies in HBM, which the budget charges.
        prices: exchange rates.
        widths: [X, L] width indices to be tried as the one width of a layer's HBM.
    """
    items = _items(table, in_place, lost, expected, wanted, present, prices, widths)
    ranked = _ranked_sums(items, expected)
    gpu = _launch_s(table, items, expected) + np.maximum(
        ranked["gpu_s"], prices.gpu_factor * table.gpu_token_s * ranked["load"]
    )
    far = items.far_s.sum(-1, keepdims=True) - ranked["far_s"]
    share = np.minimum(ranked["load"] / max(expected.n_tokens * expected.top_k, 1e-12), 1.0)
    far_var = _variance(items.far_s, expected).sum(-1, keepdims=True) - ranked["far_var"]
    spread = np.maximum(ranked["gpu_var"] + far_var, 0.0)
    if in_place:
        far = _far_branch_s(table, far, share, expected)
        difference = np.sqrt((gpu - far) ** 2 + 2 / np.pi * spread)
        # E max(G, N): exact where the means agree (normal difference) and where they lie far apart.
        longer = 0.5 * (gpu + far + difference)
        seconds = table.overlap * longer + (1 - table.overlap) * (gpu + far)
        far_share = 0.5 + 0.5 * (far - gpu) / np.maximum(difference, 1e-30)
    else:
        seconds = gpu + far
        far_share = np.ones_like(seconds)
    loss = items.far_loss.sum(-1, keepdims=True) - ranked["far_loss"] + ranked["hbm_loss"]
    objective = prices.second * seconds + loss + ranked["move"]
    return Fillings(
        objective=_by_layer(objective),
        seconds=_by_layer(seconds),
        n_bytes=_by_layer(ranked["n_bytes"]),
        far_share=_by_layer(far_share),
        items=items,
    )


def far_seconds(table: CostTable, in_place: bool, expected: Forecast) -> FloatArray:
    """[L, E, NB] expected seconds per step that an expert costs outside HBM."""
    active = expected.active[..., None]
    if not in_place:
        fetched: FloatArray = active * (table.copy_s + table.gpu_weight_s)
        return fetched
    tokens = expected.load[..., None] / np.maximum(active, 1e-12)
    compute = np.maximum(tokens, table.far_min_tokens) * table.far_token_s
    served: FloatArray = active * np.maximum(table.far_weight_s, compute)
    return served


def _items(
    table: CostTable,
    in_place: bool,
    lost: FloatArray,
    expected: Forecast,
    wanted: IntArray,
    present: IntArray,
    prices: Prices,
    widths: IntArray,
) -> Items:
    """Widths, costs in and out of HBM, and the ranking, for every rule of choosing HBM widths."""
    overlap = table.overlap if in_place else 0.0
    far_share = (overlap * prices.far_share + 1 - overlap)[:, None, None]
    gpu_share = (1 - overlap * prices.far_share)[:, None, None]
    far_s = prices.far_factor * far_seconds(table, in_place, expected)
    gpu_s = prices.gpu_factor * expected.active[..., None] * table.gpu_weight_s
    n_bytes = np.maximum(table.weight_bytes, _bytes_of(table, present)[..., None]).astype(
        np.float64
    )
    moves = prices.copy_second * table.copy_s * (wanted[..., None] != table.bits)

    far_cost = prices.second * far_share * far_s + lost
    hbm_cost = prices.second * gpu_share * gpu_s + lost + moves
    far_index = far_cost.argmin(-1)
    hbm_index = _width_rules(table, wanted, hbm_cost + prices.byte * n_bytes, widths)
    far_cost_best, far_s_best, far_loss = _pick(far_index[None], far_cost, far_s, lost)
    hbm_best, gpu_s_best, hbm_loss, move, charged = _pick(
        hbm_index, hbm_cost, gpu_s, lost, moves, n_bytes
    )
    gain = far_cost_best - hbm_best
    key = prices.byte * charged - gain
    key[-1] -= np.where(wanted > 0, HELD_FIRST, 0.0)
    return Items(
        gpu_s=gpu_s_best,
        far_s=far_s_best[0],
        hbm_loss=hbm_loss,
        far_loss=far_loss[0],
        move=move,
        n_bytes=charged,
        hbm_index=hbm_index,
        far_index=far_index,
        gain=gain,
        ranking=np.argsort(key, axis=-1, kind="stable"),
    )


def _width_rules(
    table: CostTable, wanted: IntArray, hbm_cost: FloatArray, widths: IntArray
) -> IntArray:
    """[C, L, E] width index in HBM: one width per layer, the best per expert, held copies first."""
    best = hbm_cost.argmin(-1)
    held = np.where(wanted > 0, table.index_of[wanted], best)
    uniform = np.broadcast_to(widths[..., None], (*widths.shape, wanted.shape[-1]))
    return np.concatenate([uniform, best[None], held[None]])


def _ranked_sums(items: Items, expected: Forecast) -> dict[str, FloatArray]:
    """Sums over every prefix of the ranking, [C, L, E + 1] each."""
    shape = items.ranking.shape
    columns = {
        "gpu_s": items.gpu_s,
        "far_s": items.far_s,
        "gpu_var": _variance(items.gpu_s, expected),
        "far_var": _variance(items.far_s, expected),
        "hbm_loss": items.hbm_loss,
        "far_loss": items.far_loss,
        "move": items.move,
        "n_bytes": items.n_bytes,
        "load": expected.load,
    }
    stacked = np.empty((*shape, len(columns)))
    for column, values in enumerate(columns.values()):
        stacked[..., column] = values
    sums = _prefix_sums(stacked, items.ranking)
    return {name: sums[..., i] for i, name in enumerate(columns)}


def _prefix_sums(values: FloatArray, ranking: IntArray) -> FloatArray:
    """Sums of ``values`` [C, L, E, X] along ``ranking`` -> [C, L, E + 1, X], the first entry 0."""
    n_rankings, n_layers, n_experts, n_columns = values.shape
    rows = np.arange(n_rankings * n_layers)[:, None] * n_experts
    ranked = values.reshape(-1, n_columns)[ranking.reshape(-1, n_experts) + rows]
    sums = np.zeros((n_rankings, n_layers, n_experts + 1, n_columns))
    np.cumsum(ranked.reshape(values.shape), axis=2, out=sums[:, :, 1:])
    return sums


def _launch_s(table: CostTable, items: Items, expected: Forecast) -> FloatArray:
    """[C, L, E + 1] (or 0) expected launches: one per width of which some expert is active."""
    if not table.gpu_launch_s.any():
        return np.zeros(1)
    one_hot = items.hbm_index[..., None] == np.arange(len(table.bits))
    busy = _prefix_sums(one_hot * expected.active[..., None], items.ranking)
    launches: FloatArray = (1 - np.exp(-busy)) @ table.gpu_launch_s
    return launches


def _by_layer(values: FloatArray) -> FloatArray:
    """[C, L, E + 1] -> [L, C, E + 1], contiguous."""
    return np.ascontiguousarray(np.moveaxis(values, 0, 1))


def _variance(seconds: FloatArray, expected: Forecast) -> FloatArray:
    """Variance of an expert's time, given its expectation and that it is active or not."""
    chance = np.maximum(expected.active, 1e-12)
    return seconds**2 * (1 - expected.active) / chance


def _far_branch_s(
    table: CostTable, experts_s: FloatArray, gpu_share: FloatArray, expected: Forecast
) -> FloatArray:
    """Far branch with activations and floor; a token crosses unless all K experts are in HBM."""
    stays = gpu_share**expected.top_k
    crossing = expected.n_tokens * (1 - stays)
    any_far = 1 - stays**expected.n_tokens
    sent = any_far * 2 * table.link_latency_s + crossing * table.activation_token_s
    return np.maximum(any_far * table.far_floor_s, sent + experts_s)


def _bytes_of(table: CostTable, bits: IntArray) -> IntArray:
    """Bytes of the copies ``bits``; 0 where there is none."""
    return np.where(bits > 0, table.weight_bytes[table.index_of[bits]], 0)


def _pick(index: IntArray, *values: FloatArray) -> list[FloatArray]:
    """Each of ``values`` [L, E, NB] at the width ``index`` [C, L, E]."""
    n_widths = values[0].shape[-1]
    flat = np.arange(index[0].size).reshape(index.shape[1:]) * n_widths + index
    return [np.ascontiguousarray(v).ravel()[flat] for v in values]
