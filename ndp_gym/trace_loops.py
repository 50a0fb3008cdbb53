"""Text that repeats itself under greedy decoding, found by its routing."""

from itertools import product

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
    if n < _LAGS[0] + _TRAIL:
        return looped
    ranks = np.ascontiguousarray(expert_ids.transpose(2, 0, 1))  # [K, n, L]
    if int(ranks.min()) >= 0 and int(ranks.max()) < 2**16:
        ranks = ranks.astype(np.uint16)  # a quarter of the time
    for lag in _LAGS:
        if n - lag < _TRAIL:
            break
        same = np.zeros((n - lag, n_layers), dtype=np.uint16)
        for one, other in product(ranks, ranks):  # memory of one comparison, whatever the ids
            same += one[lag:] == other[:-lag]
        overlap = same.sum(axis=1) / (n_layers * top_k)
        trailing = np.convolve(overlap, np.full(_TRAIL, 1 / _TRAIL), mode="valid")
        looped[np.flatnonzero(trailing > _SAME) + lag + _TRAIL - 1] = True
    return looped


def loop_free_rows(expert_ids: npt.NDArray[np.integer]) -> int:
    """Rows before the first repetition: its first flagged row minus the 24 that flagged it.

    At least 1, since a request cannot be empty.
    """
    looped = looped_rows(expert_ids)
    return max(1, int(np.argmax(looped)) - _TRAIL) if looped.any() else len(looped)
