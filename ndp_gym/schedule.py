"""Which request sits in which batch slot: admission, decode and retirement, for N lanes.

It knows the request table and the clock in windows, neither experts nor seconds.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ndp_gym.trace_requests import Requests

IntArray = NDArray[np.int64]
Scheduling = Literal["continuous", "static"]
IDLE = -1


class Schedule:
    """Slots of N lanes over one request table.

    Attributes:
        request: [N, B] index into the request table, -1 where the slot is idle.
        position: [N, B] rows of the request already replayed, prefill included.
        generated: [N] tokens decoded since `reset`.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        n_lanes: int,
        batch_size: int,
        window: int,
        scheduling: Scheduling,
    ) -> None:
        """Idle slots everywhere."""
        self.requests, self.window, self.scheduling = requests, window, scheduling
        self.request = np.full((n_lanes, batch_size), IDLE, np.int64)
        self.position = np.zeros((n_lanes, batch_size), np.int64)
        self.generated = np.zeros(n_lanes, np.int64)
        self._waiting: list[IntArray] = [np.empty(0, np.int64)] * n_lanes
        self._next = np.zeros(n_lanes, np.int64)

    def reset(self, lane: int, order: IntArray) -> list[int]:
        """Queue the requests ``order`` on an empty lane and admit the first -> slots admitted."""
        self._waiting[lane] = order
        self._next[lane] = 0
        self.generated[lane] = 0
        self.request[lane] = IDLE
        return self.admit(lane)

    def admit(self, lane: int) -> list[int]:
        """Fill idle slots from the queue: any (continuous), or only once all are idle (static)."""
        slots = self.request[lane]
        if self.scheduling == "static" and (slots != IDLE).any():
            return []
        admitted = []
        for slot in np.flatnonzero(slots == IDLE):
            if self._next[lane] >= self._waiting[lane].size:
                break
            index = self._waiting[lane][self._next[lane]]
            self._next[lane] += 1
            slots[slot] = index
            self.position[lane, slot] = self.requests.n_prompt[index]
            admitted.append(int(slot))
        return admitted

    def next_rows(self) -> tuple[IntArray, IntArray, IntArray]:
        """The coming window's first rows, numbers of rows and contexts before it; [N, B] each."""
        live = self.request != IDLE
        index = np.where(live, self.request, 0)
        remaining = np.where(live, self.requests.length[index] - self.position, 0)
        return (
            self.requests.start[index] + self.position,
            np.minimum(remaining, self.window),
            self.requests.context_offset[index] + self.position,
        )

    def advance(self) -> NDArray[np.bool_]:
        """Move every live request one window on; free and return [N, B] slots that ended."""
        _, n_rows, _ = self.next_rows()
        self.position += n_rows
        self.generated += n_rows.sum(axis=1)
        live = self.request != IDLE
        index = np.where(live, self.request, 0)
        ended: NDArray[np.bool_] = live & (self.position >= self.requests.length[index])
        self.request[ended] = IDLE
        return ended

    def live(self) -> NDArray[np.bool_]:
        """[N, B] slots that hold a request."""
        live: NDArray[np.bool_] = self.request != IDLE
        return live

    def contexts(self) -> IntArray:
        """[N, B] tokens in each live request's context, 0 where idle."""
        live = self.live()
        return np.where(
            live, self.requests.context_offset[np.where(live, self.request, 0)] + self.position, 0
        )

    def is_done(self) -> NDArray[np.bool_]:
        """[N] lanes with nothing live; their queue is empty too, as admission comes first."""
        return np.logical_not(self.live().any(axis=1))
