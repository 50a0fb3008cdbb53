"""A layer that many batches pass together: when each copy and each expert is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from train.studies.recordings import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one group of ``n_batches`` asks of GPU and link, layer by layer.

    Attributes:
        n_batches: batches that go through a layer together.
        attention_s: [L] of one batch.
        expert_s: [L, E] compute of each expert for all batches at once, 0 where unused.
        copy_s: [L, E] over the link, 0 where resident or unused.
        known_after: [L, E] attention passes after which the expert is known to be needed.
    """

    n_batches: int
    attention_s: FloatArray
    expert_s: FloatArray
    copy_s: FloatArray
    known_after: IntArray

    @cached_property
    def busy_s(self) -> FloatArray:
        """[L] seconds in which the GPU computes."""
        return np.asarray(self.n_batches * self.attention_s + self.expert_s.sum(axis=1))

    def arrival_s(self, hot_first: bool) -> FloatArray:
        """[L, E] when a copy is complete: one after the other, as soon as it is known, else 0."""
        known_s = self.known_after * self.attention_s[:, None]
        number = np.broadcast_to(np.arange(known_s.shape[1]), known_s.shape)
        tie = -self.expert_s if hot_first else number
        order = np.lexsort((tie, known_s))
        arrived, free = np.zeros_like(known_s), np.zeros(len(known_s))
        rows = np.arange(len(known_s))
        for expert in order.T:
            copy = self.copy_s[rows, expert]
            done = np.maximum(free, known_s[rows, expert]) + copy
            free = np.where(copy > 0, done, free)
            arrived[rows, expert] = np.where(copy > 0, done, 0.0)
        return arrived

    def end_s(self, hot_first: bool) -> FloatArray:
        """[L] when the layer is complete: attention of all batches, then expert by expert.

        Hot first: the resident ones, then in the order of arrival; else by expert number.
        """
        arrived = self.arrival_s(hot_first)
        number = np.broadcast_to(np.arange(arrived.shape[1]), arrived.shape)
        order = np.argsort(arrived, axis=1, kind="stable") if hot_first else number
        rows = np.arange(len(arrived))
        now = np.asarray(self.n_batches * self.attention_s)
        for expert in order.T:
            used = self.expert_s[rows, expert] > 0
            start = np.where(used, np.maximum(now, arrived[rows, expert]), now)
            now = start + self.expert_s[rows, expert]
        return now

    def sequential_s(self) -> FloatArray:
        """[L] with nothing overlapped: attention, copies, experts."""
        return np.asarray(self.busy_s + self.copy_s.sum(axis=1))

    def bubble_share(self, hot_first: bool) -> float:
        """Share of the time in which the GPU waits for the link, all layers together."""
        return 1 - float(self.busy_s.sum() / self.end_s(hot_first).sum())


def smallest_n(bubble: Callable[[int], float], largest: int, tolerance: float) -> int | None:
    """The smallest n of which the bubble is below ``tolerance``, ``None`` if above ``largest``.

    By doubling and halving, so it takes for granted that more batches leave a smaller bubble.
    """
    low, high = 0, 1
    while bubble(high) > tolerance:
        if high == largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bubble(middle) > tolerance else (low, middle)
    return high
