"""The state between two windows and the recorded window that one step replays: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What one window hands to the next. Widths are [L, E] uint8, 0 where there is no copy.

    Attributes:
        hbm_bits: width of the pinned copy in HBM.
        far_bits: width the far device serves.
        target_bits: HBM width the last plan wanted; in flight where it differs from ``hbm_bits``.
        made_bits: last materialised width (requantise mode only).
        queue: [n] int32 codes ``layer * E + expert`` of the promotions, head first.
        head_bytes: bytes of the head that have arrived.
        cache_bits, cache_time, cache_uses: [L, E] cached copies (service "fetch"): width, tick of
            last use (of insertion for FIFO), uses since insertion.
        tick: cache events so far.
        credit: copies owed to experts outside HBM (service "balance" with a credit).
        load: [L, E] float64, tokens per expert in the last window: the default migration order.
        is_fresh: no plan has been applied yet; the first one loads in the foreground.
    """

    hbm_bits: NDArray[np.uint8]
    far_bits: NDArray[np.uint8]
    target_bits: NDArray[np.uint8]
    made_bits: NDArray[np.uint8]
    queue: NDArray[np.int32]
    head_bytes: int
    cache_bits: NDArray[np.uint8]
    cache_time: NDArray[np.int64]
    cache_uses: NDArray[np.int64]
    tick: int
    credit: float
    load: NDArray[np.float64]
    is_fresh: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The recorded routing one step replays: up to ``length`` decode rows of up to B requests.

    Attributes:
        expert_ids: [T, L, K] unsigned ids of the whole recording (usually a memory map).
        gate_weights: [T, L, K] float16, or ``None``: then ``gate_profile`` [K] stands for every
            row.
        first_row: [B] row of each slot's first token; n_rows: [B] its tokens (0..length, 0 = idle).
        context: [B] tokens in the request before ``first_row``, unrecorded ones included.
        length: decode steps W.
    """

    expert_ids: NDArray[Any]
    gate_weights: NDArray[np.float16] | None
    first_row: NDArray[np.int64]
    n_rows: NDArray[np.int64]
    context: NDArray[np.int64]
    length: int
    gate_profile: NDArray[np.float64] | None = None
