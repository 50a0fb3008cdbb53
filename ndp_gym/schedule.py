"""Which request sits in which batch slot: admission, decode and retirement, for N lanes.

It knows the request table and the clock in windows, neither experts nor seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ndp_gym.trace_requests import Requests

IntArray = NDArray[np.int64]
Scheduling = Literal["continuous", "static"]
IDLE = -1


def check_count(name: str, value: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number (not 1.5, not True) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


class Schedule:
    """Slots of N lanes over one request table.

    Attributes:
        request: [N, B] index into the request table, -1 where the slot is idle.
        row: [N, B] row of the trace that the slot replays next.
        left: [N, B] rows the request still has, 0 where idle.
        context: [N, B] tokens in the live request's context, 0 where idle.
        n_live: [N] slots that hold a request.
        n_slots: [N] slots in use, the first of the B; the others stay idle.
        extra_context: [N] tokens in every request's context before those of the request table.
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
        """Idle slots everywhere.

        Raises:
            ValueError: unknown scheduling.
        """
        if scheduling not in ("continuous", "static"):
            raise ValueError(f"scheduling must be 'continuous' or 'static', got {scheduling!r}")
        self.requests, self.window, self.scheduling = requests, window, scheduling
        slots = (n_lanes, batch_size)
        self.request = np.full(slots, IDLE, np.int64)
        self.row = np.zeros(slots, np.int64)
        self.left = np.zeros(slots, np.int64)
        self.context = np.zeros(slots, np.int64)
        self.n_live = np.zeros(n_lanes, np.int64)
        self.generated = np.zeros(n_lanes, np.int64)
        self.n_slots = np.full(n_lanes, batch_size, np.int64)
        self.extra_context = np.zeros(n_lanes, np.int64)
        self._loops = import_module("ndp_gym.lane_loops")  # numba comes with it
        self._columns = tuple(
            np.array(getattr(requests, name))  # writeable, so that one compiled version serves all
            for name in ("start", "n_prompt", "length", "context_offset")
        )
        self._waiting: list[IntArray] = [np.empty(0, np.int64)] * n_lanes
        self._n_waiting = np.zeros(n_lanes, np.int64)

    def reset(
        self, lane: int, order: IntArray, n_slots: int | None = None, extra_context: int = 0
    ) -> list[int]:
        """Queue the requests ``order`` on an empty lane and admit the first -> slots admitted."""
        self.clear(lane)
        self.n_slots[lane] = n_slots or self.request.shape[1]
        self.extra_context[lane] = extra_context
        self._waiting[lane] = order
        self._n_waiting[lane] = order.size
        self.generated[lane] = 0
        return self.admit(lane)

    def clear(self, lane: int) -> None:
        """Empty one lane's slots and queue."""
        self.request[lane] = IDLE
        self.left[lane] = 0
        self.context[lane] = 0
        self.n_live[lane] = 0
        self._n_waiting[lane] = 0

    def admit(self, lane: int) -> list[int]:
        """Fill idle slots from the queue: any (continuous), or only once all are idle (static)."""
        if not self._n_waiting[lane]:
            return []
        in_use = slice(int(self.n_slots[lane]))
        slots = self.request[lane, in_use]
        idle = np.flatnonzero(slots == IDLE).tolist()
        if self.scheduling == "static" and len(idle) < slots.size:
            return []
        queue = self._waiting[lane]
        n = self._loops.admit_slots(
            slots,
            self.row[lane, in_use],
            self.left[lane, in_use],
            self.context[lane, in_use],
            queue[queue.size - self._n_waiting[lane] :],
            self.extra_context[lane],
            self._columns,
        )
        self.n_live[lane] += n
        self._n_waiting[lane] -= n
        admitted: list[int] = idle[:n]
        return admitted

    def n_rows(self) -> IntArray:
        """[N, B] rows of each slot in the coming window; 0 where idle."""
        return np.minimum(self.left, self.window)

    def advance(self) -> list[int]:
        """Move every live request one window on and free slots that ended -> lanes with any."""
        n_live = self.n_live.copy()
        n_ended = self._loops.advance_slots(
            self.window,
            self.request,
            self.row,
            self.left,
            self.context,
            self.n_live,
            self.generated,
        )
        return np.flatnonzero(n_live != self.n_live).tolist() if n_ended else []

    def live(self) -> NDArray[np.bool_]:
        """[N, B] slots that hold a request."""
        live: NDArray[np.bool_] = self.request != IDLE
        return live

    def is_done(self) -> NDArray[np.bool_]:
        """[N] lanes with nothing live; their queue is empty too, as admission comes first."""
        done: NDArray[np.bool_] = self.n_live == 0
        return done
