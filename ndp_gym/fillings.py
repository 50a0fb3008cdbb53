"""How the ``balance`` planner may fill the HBM of each layer, and what each way should cost.

A *filling* of a layer is a prefix of a ranking of its experts. The compiled loops
(`ndp_gym.filling_loops`) evaluate every prefix of every ranking; they, and numba with them, are
imported when the first plan is made. Seconds follow ``docs/model.md`` section 3 in expectation:
active experts are independent, and E max(G, N) uses the variance of G - N.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.forecast import Forecast

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_RATES = ("second", "copy_second", "far_share", "gpu_factor", "far_factor")


class Prices(NamedTuple):
    """Exchange rates into the objective (nats of log time), at which widths and experts are bought.

    All but ``byte`` are [L], or one number for all layers.

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


class Window(NamedTuple):
    """What the coming window is like.

    Attributes:
        table: nominal costs.
        far_computes: the far device computes; else every miss is fetched.
        expected: routing.
        far_s: [L, NB, E] from `far_seconds`.
        lost: [L, NB, E] objective lost by serving the expert at that width, wherever it is.
        present: [L, E] bits of the copies in HBM, 0 = none: free to keep, and charged.
        moves: the busiest experts of a step are copied to the GPU (service ``balance``).
    """

    table: CostTable
    far_computes: bool
    expected: Forecast
    far_s: FloatArray
    lost: FloatArray
    present: IntArray
    moves: bool = False


class Items(NamedTuple):
    """What every expert costs in HBM, [C, L, E] for C rankings.

    Attributes:
        n_bytes: what its copy is charged.
        hbm_index: width.
        gain: objective that it saves there, compared with the best width outside.
        ranking: experts in the order in which they fill HBM.
    """

    n_bytes: FloatArray
    hbm_index: IntArray
    gain: FloatArray
    ranking: IntArray


class Packed(NamedTuple):
    """A window and its prices as the loops read them, see `ndp_gym.filling_loops`."""

    rates: FloatArray
    load: FloatArray
    active: FloatArray
    widths: FloatArray
    constants: FloatArray
    far_s: FloatArray
    lost: FloatArray


class Fillings(NamedTuple):
    """Cost of every prefix; [L, C, E + 1], the last axis is the number of experts in HBM.

    Rankings use each width alone, then the best per expert; the last one puts the copies present
    first, at the width they have.
    """

    objective: FloatArray
    seconds: FloatArray
    gpu_s: FloatArray
    n_bytes: FloatArray
    items: Items
    packed: Packed


@cache
def _compiled() -> tuple[ModuleType, ModuleType]:
    """The modules that bring numba: `ndp_gym.window_loops` and `ndp_gym.filling_loops`."""
    return import_module("ndp_gym.window_loops"), import_module("ndp_gym.filling_loops")


def fillings(window: Window, prices: Prices) -> Fillings:
    """Every prefix of every ranking of every layer.

    Raises:
        ValueError: an array of ``prices`` is not of one entry per layer.
    """
    _, loops = _compiled()
    n_layers, nb, n_experts = window.lost.shape
    costs = np.empty((4, n_layers, nb + 2, n_experts + 1))
    choices = np.empty((2, nb + 2, n_layers, n_experts), dtype=np.int64)
    values = np.empty((2, nb + 2, n_layers, n_experts))
    packed = _packed(window, prices)
    rates, *rest = packed
    held = window.table.index_of[window.present]
    loops.fill(rates, float(prices.byte), *rest, held, costs, choices, values)
    items = Items(
        n_bytes=values[loops.CHARGED],
        hbm_index=choices[loops.WIDTH],
        gain=values[loops.GAIN],
        ranking=choices[loops.RANKING],
    )
    return Fillings(
        objective=costs[loops.OBJECTIVE],
        seconds=costs[loops.SECONDS],
        gpu_s=costs[loops.GPU_S],
        n_bytes=costs[loops.N_BYTES],
        items=items,
        packed=packed,
    )


def _packed(window: Window, prices: Prices) -> Packed:
    table, expected = window.table, window.expected
    rates = np.empty((len(_RATES), len(window.lost)))
    for row, name in zip(rates, _RATES, strict=True):
        value = getattr(prices, name)
        try:
            row[:] = value
        except ValueError:
            shape = np.shape(value)
            raise ValueError(f"{name} must be one number or [{row.size}], not {shape}") from None
    constants = np.array(
        [
            table.gpu_token_s,
            table.far_floor_s,
            table.link_latency_s,
            table.activation_token_s,
            table.overlap if window.far_computes else -1.0,
            expected.n_tokens,
            expected.top_k,
            window.moves,
        ]
    )
    return Packed(
        rates,
        np.ascontiguousarray(expected.load),
        np.ascontiguousarray(expected.active),
        _widths(table),
        constants,
        window.far_s,
        window.lost,
    )


def _widths(table: CostTable) -> FloatArray:
    return np.array([table.weight_bytes, table.gpu_weight_s, table.gpu_launch_s, table.copy_s])


def far_seconds(table: CostTable, far_computes: bool, expected: Forecast) -> FloatArray:
    """[L, NB, E] expected seconds per step that an expert costs outside HBM.

    Where the far device computes, for at least ``far_min_tokens``; else to fetch and read it.
    """
    n_layers, n_experts = expected.load.shape
    seconds = np.empty((n_layers, len(table.bits), n_experts))
    fetch_s = np.full(len(table.bits), -1.0) if far_computes else table.copy_s + table.gpu_weight_s
    _compiled()[0].far_seconds(
        np.ascontiguousarray(expected.load), np.ascontiguousarray(expected.active),
        table.far_weight_s, table.far_token_s, float(table.far_min_tokens), fetch_s, seconds,
    )  # fmt: skip
    return seconds


def lost_at(expected: Forecast, loss: FloatArray, guard: FloatArray) -> FloatArray:
    """[L, NB, E] objective lost by serving an expert at a width.

    Args:
        expected: has the experts' shares of gate energy.
        loss: [L, NB, E] lost if all gate energy of the layer is served by that copy.
        guard: [L, NB, E] lost whatever the energy.
    """
    lost: FloatArray = loss * expected.energy[:, None] + guard
    return lost
