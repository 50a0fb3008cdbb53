"""Arrays that the kernel reads and writes, N lanes at a time: plain named tuples."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable


class LaneState(NamedTuple):
    """What one window hands to the next, for N lanes of X = L * E experts (0 bits = none)."""

    hbm: NDArray[np.uint8]  # [N, X] width of the pinned HBM copy
    far: NDArray[np.uint8]  # [N, X] width the far device serves
    target: NDArray[np.uint8]  # [N, X] HBM width the plan wants
    made: NDArray[np.uint8]  # [N, X] last materialised width (requantise mode)
    queue: NDArray[np.int32]  # [N, X] promotions, head first
    cache: NDArray[np.uint8]  # [N, X] width of the cached copy
    cache_time: NDArray[np.int64]  # [N, X] tick of last use (LRU, LFU) or insertion (FIFO)
    cache_uses: NDArray[np.int64]  # [N, X] uses since insertion
    scalars: NDArray[np.int64]  # [N, 4]
    credit: NDArray[np.float64]  # [N] copies owed to experts outside HBM (service "balance")


class Windows(NamedTuple):
    """Where the tokens of N windows stand in the recording, B slots each."""

    expert_ids: NDArray[Any]  # [T, L, K] unsigned
    gate_bits: NDArray[np.uint16]  # [T, L, K] float16 gates viewed as integers, or [0, 0, 0]
    half: NDArray[np.float64]  # [2, 32] offset and scale of a float16 by its exponent
    gate_profile: NDArray[np.float64]  # [K] used where nothing was recorded
    first_row: NDArray[np.int64]  # [N, B]
    n_rows: NDArray[np.int64]  # [N, B]
    context: NDArray[np.int64]  # [N, B] tokens before first_row


class Plans(NamedTuple):
    """N plans and the budgets they must obey."""

    tier: NDArray[np.uint8]  # [N, X]
    bits: NDArray[np.uint8]  # [N, X]
    order: NDArray[np.float64]  # [N, X] higher is promoted earlier
    services: NDArray[np.int64]  # [N, 3]
    rates: NDArray[np.float64]  # [N, 4]
    rank_bits: NDArray[np.uint8]  # [N, K] width fetched by router rank, 0 = the plan's
    budgets: NDArray[np.int64]  # [N] bytes


class Prices(NamedTuple):
    """What things cost on one system; shared by the lanes of one `run_lanes` call."""

    table: CostTable
    rel_mse: NDArray[np.float64]  # [X, NB]
    guarded: bool  # whether narrow copies of some experts collapse the model
    requantise_s: NDArray[np.float64]  # [17] by width
    ref_place: NDArray[np.int8]  # [X] `where` of the stateless reference
    ref_service: NDArray[np.int64]  # [3]
    ref_rates: NDArray[np.float64]  # [4]
    ref_rank_bits: NDArray[np.uint8]  # [K]


class Replay(NamedTuple):
    """What N windows cost under a placement, or under the reference."""

    layer: NDArray[np.float64]  # [N, L, 9]
    step_s: NDArray[np.float64]  # [N, W]
    step_tokens: NDArray[np.int64]  # [N, W]
    served: NDArray[np.int64]  # [N, 2, NB] tokens by (GPU, far) and width
    low_tokens: NDArray[np.int32]  # [N, X] tokens served at <= 2 bits, counted where guarded
    totals: NDArray[np.int64]  # [N, 9]


class Planned(NamedTuple):
    """What applying N plans did, and the tokens of their windows."""

    totals: NDArray[np.int64]  # [N, 3]
    seconds: NDArray[np.float64]  # [N, 2] first load, requantisation
    counts: NDArray[np.int32]  # [N, X]
    gate_energy: NDArray[np.float64]  # [N, X]


class Counts(NamedTuple):
    """Stage one's result, reused from lane to lane."""

    tokens: NDArray[np.int32]  # [W, X]
    energy: NDArray[np.float64]  # [W, X] sum of squared gates
    active: NDArray[np.int32]  # [W, L, A] codes in order of first appearance
    n_active: NDArray[np.int32]  # [W, L]
