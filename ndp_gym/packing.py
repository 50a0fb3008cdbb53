"""Plans, windows, states and results as the arrays that the kernel reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.kernel_data import LaneState, Planned, Replay, Windows
from ndp_gym.outcome import Outputs
from ndp_gym.specs import Service
from ndp_gym.state import Window

_KINDS = ("in_place", "fetch", "balance")
_CACHES = ("none", "lru", "lfu", "fifo")
_SCOPES = ("layer", "global")

ServiceArrays = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]
"""Codes [N, 3], rates [N, 4] and widths by router rank [N, K]; columns in `ndp_gym.kernel`."""


def stack_windows(windows: Sequence[Window]) -> Windows:
    """Windows over one recording, one per lane, as the kernel reads them."""
    first = windows[0]
    return window_arrays(
        first.expert_ids,
        first.gate_weights,
        first.gate_profile,
        np.stack([w.first_row for w in windows]),
        np.stack([w.n_rows for w in windows]),
        np.stack([w.context for w in windows]),
    )


def window_arrays(
    expert_ids: NDArray[Any],
    gate_weights: NDArray[np.float16] | None,
    gate_profile: NDArray[np.float64] | None,
    first_row: NDArray[np.int64],
    n_rows: NDArray[np.int64],
    context: NDArray[np.int64],
) -> Windows:
    """The kernel's view of a recording [T, L, K] and of each lane's slots [N, B]."""
    if gate_weights is not None and gate_weights.dtype != np.float16:
        raise ValueError(f"gate_weights must be float16, got {gate_weights.dtype}")
    ids = _read_only(expert_ids)
    top_k = ids.shape[2]
    profile = (
        np.full(top_k, 1.0 / top_k)
        if gate_profile is None
        else np.asarray(gate_profile, np.float64)
    )
    gates = np.empty((0, 0, 0), np.uint16) if gate_weights is None else gate_weights.view(np.uint16)
    return Windows(
        ids,
        _read_only(gates),
        _half(),
        profile,
        np.ascontiguousarray(first_row, np.int64),
        np.ascontiguousarray(n_rows, np.int64),
        np.ascontiguousarray(context, np.int64),
    )


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A plain read-only view, so that files and arrays in memory share one compiled kernel."""
    view = np.ascontiguousarray(array).view(np.ndarray)
    view = view[:]
    view.flags.writeable = False
    return view


@cache
def _half() -> NDArray[np.float64]:
    """[2, 32] a float16 >= 0 is (offset + fraction) * scale, both by its exponent bits."""
    exponent = np.arange(32)
    offset = np.where(exponent > 0, 1024.0, 0.0)
    table = np.stack([offset, np.exp2(np.maximum(exponent, 1) - 25.0)])
    table.flags.writeable = False
    return table


def service_arrays(services: tuple[Service, ...], top_k: int) -> ServiceArrays:
    """One service per lane as the kernel reads it."""
    codes = np.empty((len(services), 3), np.int64)
    rates = np.zeros((len(services), 4), np.float64)
    rank_bits = np.zeros((len(services), top_k), np.uint8)
    for lane, service in enumerate(services):
        codes[lane] = (
            _KINDS.index(service.kind),
            _CACHES.index(service.cache),
            _SCOPES.index(service.scope),
        )
        rates[lane, 0] = -1.0 if service.credit is None else service.credit
        if service.prefetch is not None:
            ahead = service.prefetch
            rates[lane, 1:] = ahead.depth, ahead.recall, ahead.precision
        if service.rank_bits:
            widths = [*service.rank_bits, *[service.rank_bits[-1]] * top_k]
            rank_bits[lane] = widths[:top_k]
    return codes, rates, rank_bits


def empty_state(n_lanes: int, n: int) -> LaneState:
    """States of ``n`` experts each, all zero."""
    u8, i64 = np.uint8, np.int64
    return LaneState(
        hbm=np.zeros((n_lanes, n), u8),
        far=np.zeros((n_lanes, n), u8),
        target=np.zeros((n_lanes, n), u8),
        made=np.zeros((n_lanes, n), u8),
        queue=np.zeros((n_lanes, n), np.int32),
        cache=np.zeros((n_lanes, n), u8),
        cache_time=np.zeros((n_lanes, n), i64),
        cache_uses=np.zeros((n_lanes, n), i64),
        scalars=np.zeros((n_lanes, 4), i64),
        credit=np.zeros(n_lanes),
    )


def empty_outputs(n_lanes: int, shape: tuple[int, int], length: int, n_widths: int) -> Outputs:
    """Zeroed results of windows of ``length`` steps; ``shape`` is (L, E)."""
    n = shape[0] * shape[1]
    f8, i64, i32 = np.float64, np.int64, np.int32
    replays = [
        Replay(
            layer=np.zeros((n_lanes, shape[0], 9), f8),
            step_s=np.zeros((n_lanes, length), f8),
            step_tokens=np.zeros((n_lanes, length), i64),
            served=np.zeros((n_lanes, 2, n_widths), i64),
            low_tokens=np.zeros((n_lanes, n), i32),
            totals=np.zeros((n_lanes, 9), i64),
        )
        for _ in range(2)
    ]
    planned = Planned(
        totals=np.zeros((n_lanes, 3), i64),
        seconds=np.zeros((n_lanes, 2), f8),
        counts=np.zeros((n_lanes, n), i32),
        gate_energy=np.zeros((n_lanes, n), f8),
    )
    return Outputs(planned, replays[0], replays[1])
