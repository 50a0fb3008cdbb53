"""Text that repeats itself under greedy decoding, found by its routing (traces.md §2.1)."""

import numpy as np
import numpy.typing as npt

_TRAIL = 24  # rows the overlap is averaged over
_LAGS = range(2, 160)
_SAME = 0.8


def looped_rows(expert_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Rows ``[n]`` inside a repetition, for the ids ``[n, L, K]`` of one request.

    True where the trailing 24-row mean of the set overlap with some lag in 2..159 exceeds 0.8.
    """
    n, n_layers, top_k = expert_ids.shape
    looped = np.zeros(n, dtype=np.bool_)
    n_experts = int(expert_ids.max()) + 1
    hot = np.zeros((n, n_layers, n_experts), dtype=np.float32)
    np.put_along_axis(hot, expert_ids.astype(np.int64), 1.0, axis=2)
    rows = hot.reshape(n, -1)
    for lag in _LAGS:
        if n - lag < _TRAIL:
            break
        overlap = np.einsum("ij,ij->i", rows[lag:], rows[:-lag]) / (n_layers * top_k)
        trailing = np.convolve(overlap, np.full(_TRAIL, 1 / _TRAIL), mode="valid")
        looped[np.flatnonzero(trailing > _SAME) + lag + _TRAIL - 1] = True
    return looped


def loop_free_rows(expert_ids: npt.NDArray[np.integer]) -> int:
    """Rows before the first repetition: its first flagged row minus the 24 that flagged it.

    At least 1, since a request cannot be empty.
    """
    looped = looped_rows(expert_ids)
    return max(1, int(np.argmax(looped)) - _TRAIL) if looped.any() else len(looped)
