"""`Simulator`: N independent lanes of state that one call advances through the compiled kernel.

It packs plans and windows into arrays, splits the lanes over threads and hands back outcomes. It
knows neither policies nor Gymnasium. The kernel, and numba with it, is imported when the first
lane is made.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import cost_table, requantise_s
from ndp_gym.kernel_data import Counts, Plans, Prices, Windows
from ndp_gym.outcome import Outcome, Outputs, Summary, outcome_of, summary_of
from ndp_gym.packing import ServiceArrays, empty_outputs, empty_state, service_arrays
from ndp_gym.plan import nearest_width
from ndp_gym.quality import QualityModel, rel_mse_table
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.state import State

_PATIENCE_S = 1.5  # loading a compiled kernel takes less
_LANES_PER_THREAD = 4  # fewer are not worth a second thread


class Costs(NamedTuple):
    """Everything about a window's cost that depends on model, system and error model alone."""

    system: SystemSpec
    prices: Prices
    ref_bits: int  # width of the stateless reference
    summary: Summary


@lru_cache(maxsize=256)
def costs(model: MoESpec, system: SystemSpec, quality: QualityModel) -> Costs:
    """Cost tables of ``model`` on ``system`` and the stateless reference (all far, 4 bit)."""
    table = cost_table(model, system)
    seconds = np.zeros(17)
    if system.requantise:
        for bits in system.stored_bits[1:]:
            seconds[bits] = requantise_s(model, system, bits)
    ref_bits = nearest_width(system, 4)
    errors = np.ascontiguousarray(rel_mse_table(model, system, quality), dtype=np.float64)
    reference = service_arrays((system.default_service,), model.top_k)
    prices = Prices(
        table=table,
        rel_mse=errors.reshape(-1, errors.shape[-1]),
        guarded=bool(model.super_experts),
        requantise_s=seconds,
        ref_place=np.full(model.n_layers * model.n_experts, -1 - table.index_of[ref_bits], np.int8),
        ref_service=reference[0][0],
        ref_rates=reference[1][0],
        ref_rank_bits=reference[2][0],
    )
    return Costs(system, prices, ref_bits, summary_of(model, system))


class Simulator:
    """N lanes of states that one call advances together, each by its own plan and window.

    The arrays of ``state`` are owned and updated in place; `transition` is the pure view of one
    lane.
    """

    def __init__(
        self, model: MoESpec, system: SystemSpec, quality: QualityModel, *, n_lanes: int
    ) -> None:
        """Empty lanes, all on ``system``."""
        self.model, self.quality, self.n_lanes = model, quality, n_lanes
        self.shape = (model.n_layers, model.n_experts)
        self.costs = [costs(model, system, quality)] * n_lanes
        self.state = empty_state(n_lanes, model.n_layers * model.n_experts)
        self._no_state = empty_state(1, model.n_layers * model.n_experts)
        self._services: tuple[Sequence[Service], ServiceArrays] | None = None
        self._counts: tuple[tuple[int, ...], list[Counts]] = ((), [])
        self._is_loaded = False
        for lane in range(n_lanes):
            self.reset(lane, system)

    def reset(self, lane: int, system: SystemSpec) -> None:
        """Empty one lane's HBM and put it on ``system``, the actual one."""
        self.put_system(lane, system)
        for array in self.state:
            array[lane] = 0
        self.state.made[lane] = system.stored_bits[0]
        self.state.scalars[lane, 3] = 1

    def put_system(self, lane: int, system: SystemSpec) -> None:
        """Let ``system``, of the same stored widths, run one lane from now on; its state stays."""
        if system is not self.costs[lane].system:
            self.costs[lane] = costs(self.model, system, self.quality)

    def advance(
        self,
        *,
        tier: NDArray[np.uint8],
        bits: NDArray[np.uint8],
        order: NDArray[np.float64],
        services: Sequence[Service],
        windows: Windows,
        length: int,
        budgets: NDArray[np.int64],
    ) -> Outcome:
        """One window of every lane -> outcome with a lane axis.

        ``tier``, ``bits``, ``order``: [N, L, E]; ``budgets``: [N] bytes; one service per lane.

        Plans are trusted: `ndp_gym.plan.check_plan` names what is wrong with one.
        """
        flat = (self.n_lanes, -1)
        plans = Plans(
            np.ascontiguousarray(tier, np.uint8).reshape(flat),
            np.ascontiguousarray(bits, np.uint8).reshape(flat),
            np.ascontiguousarray(order, np.float64).reshape(flat),
            *self._service_arrays(services),
            np.ascontiguousarray(budgets, np.int64),
        )
        n_widths = self.costs[0].prices.table.bits.size
        outputs = empty_outputs(self.n_lanes, self.shape, length, n_widths)
        self._run(windows, plans, outputs)
        summaries = [cost.summary for cost in self.costs]
        return outcome_of(outputs, self.model, summaries, self.quality)

    def _run(self, windows: Windows, plans: Plans, outputs: Outputs) -> None:
        """All lanes, on as many threads as pay."""
        from ndp_gym.kernel import run_lanes

        scratch = self._scratch(n_chunks(self.n_lanes), outputs.replay.step_s.shape[1], windows)
        state, no_state = self.state, self._no_state

        def run(chunk: int, lo: int, hi: int) -> None:
            for first, last in _same(self.costs, lo, hi):
                prices, counts = self.costs[first].prices, scratch[chunk]
                run_lanes(first, last, windows, plans, prices, state, no_state, counts, *outputs)

        # nothing compiled or loaded yet in this process (a wrapper that measures has no signatures)
        if not self._is_loaded and not getattr(run_lanes, "signatures", True):
            with _said_if_slow():
                prices = self.costs[0].prices
                run_lanes(0, 0, windows, plans, prices, state, no_state, scratch[0], *outputs)
        self._is_loaded = True  # asking numba costs as much as a window
        over_lanes(self.n_lanes, run)

    def _scratch(self, n: int, n_steps: int, windows: Windows) -> list[Counts]:
        """Zeroed counts for ``n`` threads; kept, since fresh memory costs page faults."""
        from ndp_gym.kernel import empty_counts

        key = (n_steps, *self.shape, windows.n_rows.shape[1], windows.expert_ids.shape[2])
        if self._counts[0] != key:
            self._counts = key, []
        kept = self._counts[1]
        while len(kept) < n:
            kept.append(empty_counts(*key))
        return kept[:n]

    def _service_arrays(self, services: Sequence[Service]) -> ServiceArrays:
        """`service_arrays` of the lanes; those of the same object as last time are kept."""
        if self._services is None or self._services[0] is not services:
            kept = tuple(services)
            self._services = kept, service_arrays(kept, self.model.top_k)
        return self._services[1]

    def put_state(self, lane: int, state: State) -> None:
        """Copy ``state`` into one lane."""
        if state.hbm_bits.shape != self.shape:
            raise ValueError(
                f"state must be of [n_layers, n_experts]={self.shape}, got {state.hbm_bits.shape}"
            )
        arrays = self.state
        for array, value in (
            (arrays.hbm, state.hbm_bits),
            (arrays.far, state.far_bits),
            (arrays.target, state.target_bits),
            (arrays.made, state.made_bits),
            (arrays.cache, state.cache_bits),
            (arrays.cache_time, state.cache_time),
            (arrays.cache_uses, state.cache_uses),
        ):
            array[lane] = value.ravel()
        arrays.queue[lane, : state.queue.size] = state.queue
        arrays.credit[lane] = state.credit
        arrays.scalars[lane] = state.queue.size, state.head_bytes, state.tick, state.is_fresh

    def get_state(self, lane: int, load: NDArray[np.float64] | None = None) -> State:
        """A copy of one lane's state; ``load`` [L, E] becomes its default migration order."""
        s = self.state
        length, head_bytes, tick, fresh = (int(v) for v in s.scalars[lane])
        return State(
            hbm_bits=s.hbm[lane].reshape(self.shape).copy(),
            far_bits=s.far[lane].reshape(self.shape).copy(),
            target_bits=s.target[lane].reshape(self.shape).copy(),
            made_bits=s.made[lane].reshape(self.shape).copy(),
            queue=s.queue[lane, :length].copy(),
            head_bytes=head_bytes,
            cache_bits=s.cache[lane].reshape(self.shape).copy(),
            cache_time=s.cache_time[lane].reshape(self.shape).copy(),
            cache_uses=s.cache_uses[lane].reshape(self.shape).copy(),
            tick=tick,
            credit=float(s.credit[lane]),
            load=np.zeros(self.shape) if load is None else load,
            is_fresh=bool(fresh),
        )


@contextmanager
def _said_if_slow() -> Iterator[None]:
    """Tell the user what takes so long when the kernel has to be compiled."""
    text = "compiling the simulator, once on this machine: about 20 seconds"
    timer = threading.Timer(_PATIENCE_S, logging.getLogger("ndp_gym").warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def n_chunks(n_lanes: int, per_thread: int = _LANES_PER_THREAD) -> int:
    """Into how many parts `over_lanes` splits."""
    return max(1, min(_n_threads(), n_lanes // per_thread))


def over_lanes(
    n_lanes: int, run: Callable[[int, int, int], None], per_thread: int = _LANES_PER_THREAD
) -> None:
    """Call ``run(chunk, first, last)`` for parts of the lanes, on as many threads as pay.

    ``run`` should spend its time in compiled code that lets go of Python's lock; ``per_thread``
    lanes of it are worth a thread.
    """
    chunks = n_chunks(n_lanes, per_thread)
    if chunks == 1:
        run(0, 0, n_lanes)
        return
    edges = [n_lanes * i // chunks for i in range(chunks + 1)]
    list(_threads().map(run, range(chunks), edges[:-1], edges[1:]))


@cache
def _n_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_n_threads(), thread_name_prefix="ndp_gym")


def _same(items: Sequence[Costs], first: int, last: int) -> Iterable[tuple[int, int]]:
    """Runs (first, last) of neighbours between two lanes that are the same object."""
    for i in range(first + 1, last + 1):
        if i == last or items[i] is not items[first]:
            yield first, i
            first = i
