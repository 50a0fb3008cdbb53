"""Text that stands in two splits, found by its routing.

Recomputing the same text changes a small share of the expert sets (numeric jitter, about 0.3 % per
layer and token in HD-MoE's Mixtral), so spans compare as sets and may differ in some.
"""

import itertools

import numpy as np
import numpy.typing as npt

from ndp_gym.trace_requests import IntArray, Requests

MIN_SPAN = 64
SAME_SHARE = 0.95  # share of (token, layer) expert sets that agree in a shared span
_ANCHOR = 8  # consecutive tokens that agree exactly somewhere in a shared span
_MAX_PAIRS = 64  # anchor pairs looked at per repeated anchor
_CHUNK = 2**22


def find_shared_span(
    expert_ids: npt.NDArray[np.integer], requests: Requests
) -> tuple[int, int, int] | None:
    """First pair of rows in different splits from where ``MIN_SPAN`` tokens are routed alike.

    Exact 8-token anchors are found by hash; around each, 64 consecutive rows are compared as sets
    and count as the same text where the first and the last row agree and 95 % of all sets do.

    Returns:
        ``(row, other row, n_rows)`` or None. Always None where every expert is used by every token.
    """
    if len(np.unique(requests.split)) < 2 or requests.length.max() < MIN_SPAN:
        return None
    owner = np.repeat(np.arange(len(requests)), requests.length)
    rows = np.concatenate(
        [np.arange(s, e) for s, e in zip(requests.start, requests.end, strict=True)]
    )
    hashes = _row_hashes(expert_ids)
    grams, starts, holders = _anchors(hashes[rows], rows, owner, requests)
    seen: set[tuple[int, int]] = set()
    for i, j in _pairs(grams, requests.split[holders]):
        a, b = int(starts[i]), int(starts[j])
        key = (a - b, a // MIN_SPAN)
        if key in seen:
            continue
        seen.add(key)
        found = _longest_around(expert_ids, requests, a, b, int(holders[i]), int(holders[j]))
        if found is not None:
            return found
    return None


def _row_hashes(expert_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """One hash per row of its expert sets, the order inside a set ignored."""
    n_rows, n_layers, top_k = expert_ids.shape
    random = np.random.default_rng(0)
    values = random.integers(1, 2**63, size=(n_layers, int(expert_ids.max()) + 1), dtype=np.uint64)
    result = np.zeros(n_rows, dtype=np.uint64)
    step = max(1, _CHUNK // (n_layers * top_k))
    layer = np.arange(n_layers)[None, :, None]
    for first in range(0, n_rows, step):
        result[first : first + step] = values[layer, expert_ids[first : first + step]].sum(
            axis=(1, 2)
        )
    return result


def _anchors(
    hashes: npt.NDArray[np.uint64], rows: IntArray, owner: IntArray, requests: Requests
) -> tuple[npt.NDArray[np.uint64], IntArray, IntArray]:
    """Hash, first row and request of every run of 8 rows inside a request of at least 64."""
    n = len(hashes) - _ANCHOR + 1
    grams = np.zeros(n, dtype=np.uint64)
    for i in range(_ANCHOR):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + n]
    inside = (owner[:n] == owner[_ANCHOR - 1 :]) & (requests.length[owner[:n]] >= MIN_SPAN)
    return grams[inside], rows[:n][inside], owner[:n][inside]


def _pairs(grams: npt.NDArray[np.uint64], split: IntArray) -> list[tuple[int, int]]:
    """Pairs of anchors with the same hash in different splits, at most 64 per hash."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    bounds = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    pairs: list[tuple[int, int]] = []
    for first, last in itertools.pairwise(bounds):
        if last - first < 2:
            continue
        members = order[first:last]
        if (split[members] == split[members[0]]).all():
            continue
        cross = (
            (i, j) for n, i in enumerate(members) for j in members[n + 1 :] if split[i] != split[j]
        )
        pairs.extend((int(i), int(j)) for (i, j), _ in zip(cross, range(_MAX_PAIRS), strict=False))
    return pairs


def _longest_around(
    expert_ids: npt.NDArray[np.integer], requests: Requests, a: int, b: int, of_a: int, of_b: int
) -> tuple[int, int, int] | None:
    back = int(min(MIN_SPAN, a - requests.start[of_a], b - requests.start[of_b]))
    ahead = int(min(2 * MIN_SPAN, requests.end[of_a] - a, requests.end[of_b] - b))
    if back + ahead < MIN_SPAN or expert_ids.shape[2] == int(expert_ids.max()) + 1:
        return None
    one = np.sort(expert_ids[a - back : a + ahead], axis=2)
    two = np.sort(expert_ids[b - back : b + ahead], axis=2)
    same = (one == two).all(axis=2).mean(axis=1)
    means = np.convolve(same, np.ones(MIN_SPAN) / MIN_SPAN, mode="valid")
    whole = same == 1.0
    ends = whole[: 1 - MIN_SPAN] & whole[MIN_SPAN - 1 :]
    good = np.flatnonzero((means >= SAME_SHARE) & ends)
    if not len(good):
        return None
    first = int(good[0])
    return a - back + first, b - back + first, int(good[-1]) - first + MIN_SPAN
