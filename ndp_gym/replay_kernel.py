"""Compiled cache replay over a stream of keys: every request costs O(1) or O(log capacity).

Cache states are arrays indexed by key; a miss is always admitted. Equal sizes.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]

LRU, FIFO, LFU, LFU_PERFECT, MIN = range(5)


@njit(cache=True)
def next_uses(keys: Ints, n_keys: int) -> Ints:
    """Position of the next request of the same key; beyond ``len(keys)`` where there is none."""
    n = len(keys)
    result = np.empty(n, dtype=np.int64)
    seen = np.full(n_keys, -1, dtype=np.int64)
    for i in range(n - 1, -1, -1):
        result[i] = seen[keys[i]] if seen[keys[i]] >= 0 else 2 * n - i
        seen[keys[i]] = i
    return result


@njit(cache=True)
def _swap(heap: Ints, place: Ints, i: int, j: int) -> None:
    heap[i], heap[j] = heap[j], heap[i]
    place[heap[i]] = i
    place[heap[j]] = j


@njit(cache=True)
def _less(first: Ints, second: Ints, a: int, b: int) -> bool:
    return bool(first[a] < first[b] or (first[a] == first[b] and second[a] < second[b]))


@njit(cache=True)
def _up(heap: Ints, place: Ints, first: Ints, second: Ints, i: int) -> None:
    while i > 0:
        parent = (i - 1) // 2
        if not _less(first, second, heap[i], heap[parent]):
            return
        _swap(heap, place, i, parent)
        i = parent


@njit(cache=True)
def _down(heap: Ints, place: Ints, first: Ints, second: Ints, size: int, i: int) -> None:
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _less(first, second, heap[child + 1], heap[child]):
            child += 1
        if not _less(first, second, heap[child], heap[i]):
            return
        _swap(heap, place, i, child)
        i = child


@njit(cache=True)
def replay(keys: Ints, n_keys: int, capacity: int, policy: int) -> npt.NDArray[np.bool_]:
    """Whether each request hits.

    A heap of the cached keys is ordered by (first, second); its top is evicted:
    LRU (last use), FIFO (insertion), LFU (count since insertion, last use), LFU_PERFECT (count
    since the start, last use), MIN (latest next use).
    """
    n = len(keys)
    hits = np.zeros(n, dtype=np.bool_)
    upcoming = next_uses(keys, n_keys)
    first = np.zeros(n_keys, dtype=np.int64)
    second = np.zeros(n_keys, dtype=np.int64)
    place = np.full(n_keys, -1, dtype=np.int64)
    heap = np.empty(max(1, min(capacity, n_keys)), dtype=np.int64)
    size = 0
    for i in range(n):
        key = keys[i]
        hit = place[key] >= 0
        hits[i] = hit
        if not hit:
            if capacity == 0:
                continue
            if size == len(heap):
                size -= 1
                victim = heap[0]
                _swap(heap, place, 0, size)
                place[victim] = -1
                _down(heap, place, first, second, size, 0)
        if policy == LRU:
            first[key] = i
        elif policy == FIFO:
            first[key] = first[key] if hit else i
        elif policy == LFU:
            first[key] = first[key] + 1 if hit else 1
        elif policy == LFU_PERFECT:
            first[key] += 1
        else:
            first[key] = -upcoming[i]
        second[key] = i
        if not hit:
            heap[size] = key
            place[key] = size
            size += 1
        _up(heap, place, first, second, place[key])
        _down(heap, place, first, second, size, place[key])
    return hits
