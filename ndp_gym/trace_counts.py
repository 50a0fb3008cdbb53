"""How often every expert of a recording was chosen: the counts a popularity profile is made of."""

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS

FloatArray = npt.NDArray[np.float64]
_AT_ONCE = 2**16  # rows


def decode_counts(trace: RoutingTrace, requests: npt.NDArray[np.int64]) -> FloatArray:
    """[L, E] routed tokens per expert over the decode rows of ``requests`` (indices)."""
    total = np.zeros(trace.n_layers * trace.n_experts)
    table = trace.requests
    for index in requests:
        first = int(table.start[index] + table.n_prompt[index])
        _count(trace, first, int(table.n_decode[index]), total)
    return total.reshape(trace.n_layers, trace.n_experts)


def all_counts(trace: RoutingTrace) -> FloatArray:
    """[L, E] routed tokens per expert over all rows."""
    total = np.zeros(trace.n_layers * trace.n_experts)
    _count(trace, 0, trace.n_rows, total)
    return total.reshape(trace.n_layers, trace.n_experts)


def train_profile(trace: RoutingTrace) -> FloatArray | None:
    """[L, E] tokens per decode token on the train split, ``None`` where there is no such split."""
    requests = trace.requests
    is_train = (requests.split == SPLITS.index("train")) & (requests.n_decode > 0)
    if not is_train.any():
        return None
    train = np.flatnonzero(is_train)
    return decode_counts(trace, train) / float(requests.n_decode[train].sum())


def _count(trace: RoutingTrace, first: int, n_rows: int, total: FloatArray) -> None:
    """Add the choices of ``n_rows`` rows to the flat counts."""
    offsets = (np.arange(trace.n_layers) * trace.n_experts)[:, None]
    for start in range(first, first + n_rows, _AT_ONCE):
        ids, _ = trace.window(start, min(_AT_ONCE, first + n_rows - start))
        total += np.bincount((ids.astype(np.int64) + offsets).ravel(), minlength=total.size)
