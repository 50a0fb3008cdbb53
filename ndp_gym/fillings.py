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

PRESENT_FIRST = 1e9


class Prices(NamedTuple):
    """Exchange rates into the objective (nats of log time), at which widths and experts are bought.

    All but ``byte`` are [L], or one number for all layers: see `per_layer`.

    Attributes:
        second: of a step's second.
        byte: of an HBM byte.
        copy_second: of a second of copying over the link.
        far_share: what a second of the far device adds to the layer's time, 1 where it is the
            slower side; the GPU's second adds the rest.
        gpu_factor, far_factor: expected seconds are multiplied by these.
    """

    second: FloatArray | float
    byte: float
    copy_second: FloatArray | float
    far_share: FloatArray | float
    gpu_factor: FloatArray | float
    far_factor: FloatArray | float


class LayerPrices(NamedTuple):
    """`Prices` with every field but ``byte`` an array [L]."""

    second: FloatArray
    byte: float
    copy_second: FloatArray
    far_share: FloatArray
    gpu_factor: FloatArray
    far_factor: FloatArray


class Window(NamedTuple):
    """What the coming window is like.

    Attributes:
        table: nominal costs.
        in_place: the far device computes; else every miss is fetched.
        expected: routing.
        lost: [L, E, NB] objective lost by serving the expert at that width, wherever it is.
        present: [L, E] bits of the copies in HBM, 0 = none: free to keep, and charged.
    """

    table: CostTable
    in_place: bool
    expected: Forecast
    lost: FloatArray
    present: IntArray


class Items(NamedTuple):
    """What every expert costs in HBM, [C, L, E] for C rankings, and far, [L, E]."""

    gpu_s: FloatArray
    far_s: FloatArray
    hbm_loss: FloatArray
    far_loss: FloatArray
    copy_s: FloatArray
    n_bytes: FloatArray
    hbm_index: IntArray
    far_index: IntArray
    gain: FloatArray
    ranking: IntArray


class Fillings(NamedTuple):
    """Cost of every prefix; [L, C, E + 1], the last axis is the number of experts in HBM.

    The last ranking puts the copies present first, at the width they have.
    """

    objective: FloatArray
    seconds: FloatArray
    gpu_s: FloatArray
    copy_s: FloatArray
    n_bytes: FloatArray
    items: Items


def fillings(window: Window, prices: Prices) -> Fillings:
    """Every prefix of every ranking of every layer."""
    table, expected = window.table, window.expected
    layers = per_layer(prices, len(expected.load))
    items = _items(window, layers)
    ranked = _ranked_sums(items, expected)
    compute_s = layers.gpu_factor[:, None] * table.gpu_token_s * ranked["load"]
    gpu_s = _launch_s(table, items, expected, ranked["active"])
    gpu_s = gpu_s + np.maximum(ranked["gpu_s"], compute_s)
    far_s = items.far_s.sum(-1, keepdims=True) - ranked["far_s"]
    far_var = variance(items.far_s, expected).sum(-1, keepdims=True) - ranked["far_var"]
    spread = np.maximum(ranked["gpu_var"] + far_var, 0.0)
    seconds = layer_seconds(window, gpu_s, far_s, spread, ranked["load"])
    loss = items.far_loss.sum(-1, keepdims=True) - ranked["far_loss"] + ranked["hbm_loss"]
    copying = layers.copy_second[:, None] * ranked["copy_s"]
    return Fillings(
        objective=_by_layer(layers.second[:, None] * seconds + loss + copying),
        seconds=_by_layer(seconds),
        gpu_s=_by_layer(gpu_s),
        copy_s=_by_layer(ranked["copy_s"]),
        n_bytes=_by_layer(ranked["n_bytes"]),
        items=items,
    )


def per_layer(prices: Prices, n_layers: int) -> LayerPrices:
    """``prices`` with numbers repeated for every layer.

    Raises:
        ValueError: an array is not of one entry per layer.
    """
    arrays: dict[str, FloatArray] = {}
    for name in ("second", "copy_second", "far_share", "gpu_factor", "far_factor"):
        value = np.asarray(getattr(prices, name), dtype=np.float64)
        if value.shape not in ((), (n_layers,)):
            raise ValueError(f"{name} must be one number or [{n_layers}], not {value.shape}")
        arrays[name] = np.broadcast_to(value, n_layers)
    return LayerPrices(byte=prices.byte, **arrays)


def layer_seconds(
    window: Window, gpu_s: FloatArray, far_s: FloatArray, spread: FloatArray, hbm_load: FloatArray
) -> FloatArray:
    """Expected seconds of a layer's experts: GPU and far branch, overlapped or in series.

    Args:
        window: tells where misses are served.
        gpu_s: expected seconds of the HBM experts.
        far_s: expected seconds of the others, without activations.
        spread: variance of the difference of the two.
        hbm_load: tokens per step served from HBM.
    """
    if not window.in_place:
        return gpu_s + far_s
    table = window.table
    far_s = _far_branch_s(table, far_s, hbm_load, window.expected)
    # E max(G, N): exact where the means agree (normal difference) and where they lie far apart.
    longer = 0.5 * (gpu_s + far_s + np.sqrt((gpu_s - far_s) ** 2 + 2 / np.pi * spread))
    seconds: FloatArray = table.overlap * longer + (1 - table.overlap) * (gpu_s + far_s)
    return seconds


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


def _items(window: Window, prices: LayerPrices) -> Items:
    """Widths, costs in and out of HBM, and the ranking, for every rule of choosing HBM widths."""
    table, present, lost = window.table, window.present, window.lost
    overlap = table.overlap if window.in_place else 0.0
    far_price = (prices.second * (overlap * prices.far_share + 1 - overlap))[:, None, None]
    # Ranked as if the far device were at least as slow: HBM would else fill with cold experts.
    far_rank = prices.second * (overlap * np.maximum(prices.far_share, 0.5) + 1 - overlap)
    gpu_price = (prices.second * (1 - overlap * np.maximum(prices.far_share, 0.5)))[:, None, None]
    far_s = prices.far_factor[:, None, None] * far_seconds(table, window.in_place, window.expected)
    gpu_s = (prices.gpu_factor[:, None] * window.expected.active)[..., None] * table.gpu_weight_s
    n_bytes = np.maximum(table.weight_bytes, _bytes_of(table, present)[..., None]).astype(
        np.float64
    )
    copy_s = table.copy_s * (present[..., None] != table.bits)

    far_index = (far_price * far_s + lost).argmin(-1)
    far_s_best, far_loss = _pick(far_index[None], far_s, lost)
    hbm_cost = gpu_price * gpu_s + lost + prices.copy_second[:, None, None] * copy_s
    hbm_index = _width_rules(table, present, hbm_cost + prices.byte * n_bytes)
    hbm_best, gpu_s_best, hbm_loss, copy_s_best, charged = _pick(
        hbm_index, hbm_cost, gpu_s, lost, copy_s, n_bytes
    )
    gain = far_rank[:, None] * far_s_best + far_loss - hbm_best
    key = prices.byte * charged - gain
    key[-1] -= np.where(present > 0, PRESENT_FIRST, 0.0)
    return Items(
        gpu_s=gpu_s_best,
        far_s=far_s_best[0],
        hbm_loss=hbm_loss,
        far_loss=far_loss[0],
        copy_s=copy_s_best,
        n_bytes=charged,
        hbm_index=hbm_index,
        far_index=far_index,
        gain=gain,
        ranking=np.argsort(key, axis=-1, kind="stable"),
    )


def _width_rules(table: CostTable, present: IntArray, hbm_cost: FloatArray) -> IntArray:
    """[C, L, E] width index in HBM: each width alone, the best per expert, present copies first."""
    best = hbm_cost.argmin(-1)
    kept = np.where(present > 0, table.index_of[present], best)
    alone = np.arange(len(table.bits))[:, None, None]
    uniform = np.broadcast_to(alone, (len(table.bits), *present.shape))
    return np.concatenate([uniform, best[None], kept[None]])


def _ranked_sums(items: Items, expected: Forecast) -> dict[str, FloatArray]:
    """Sums over every prefix of the ranking, [C, L, E + 1] each."""
    shape = items.ranking.shape
    columns = {
        "gpu_s": items.gpu_s,
        "far_s": items.far_s,
        "gpu_var": variance(items.gpu_s, expected),
        "far_var": variance(items.far_s, expected),
        "hbm_loss": items.hbm_loss,
        "far_loss": items.far_loss,
        "copy_s": items.copy_s,
        "n_bytes": items.n_bytes,
        "load": expected.load,
        "active": expected.active,
    }
    stacked = np.empty((len(columns), *shape))
    for row, values in zip(stacked, columns.values(), strict=True):
        row[...] = values
    return dict(zip(columns, _prefix_sums(stacked, items.ranking), strict=True))


def _prefix_sums(values: FloatArray, ranking: IntArray) -> FloatArray:
    """Sums of ``values`` [X, C, L, E] along ``ranking`` -> [X, C, L, E + 1], the first entry 0."""
    n_rankings, n_layers, n_experts = ranking.shape
    rows = np.arange(n_rankings * n_layers).reshape(n_rankings, n_layers, 1) * n_experts
    ranked = np.take(values.reshape(len(values), -1), ranking + rows, axis=1)
    sums = np.zeros((len(values), n_rankings, n_layers, n_experts + 1))
    np.cumsum(ranked, axis=-1, out=sums[..., 1:])
    return sums


def _launch_s(table: CostTable, items: Items, expected: Forecast, active: FloatArray) -> FloatArray:
    """[C, L, E + 1] expected launches: one per width of which some expert is active."""
    launches = np.zeros(active.shape)
    if not table.gpu_launch_s.any():
        return launches
    alone = len(table.bits)  # the first rankings use one width each
    launches[:alone] = table.gpu_launch_s[:, None, None] * -np.expm1(-active[:alone])
    one_hot = items.hbm_index[alone:] == np.arange(alone)[:, None, None, None]
    busy = _prefix_sums(one_hot * expected.active, items.ranking[alone:])
    launches[alone:] = np.tensordot(table.gpu_launch_s, -np.expm1(-busy), axes=1)
    return launches


def _by_layer(values: FloatArray) -> FloatArray:
    """[C, L, E + 1] -> [L, C, E + 1], contiguous."""
    return np.ascontiguousarray(np.moveaxis(values, 0, 1))


def variance(seconds: FloatArray, expected: Forecast) -> FloatArray:
    """Variance of an expert's time, given its expectation and that it is active or not."""
    chance = np.maximum(expected.active, 1e-12)
    return seconds**2 * (1 - expected.active) / chance


def _far_branch_s(
    table: CostTable, experts_s: FloatArray, hbm_load: FloatArray, expected: Forecast
) -> FloatArray:
    """Far branch with activations and floor; a token crosses unless all K experts are in HBM."""
    share = np.minimum(hbm_load / (expected.n_tokens * expected.top_k), 1.0)
    stays = share**expected.top_k
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
