"""`Lanes`: N copies of the one environment, without Gymnasium.

They own the schedule, the simulator and what policies may see.

The single env is N = 1; the vector env, evaluation and oracles use the same object. An
observation holds facts of the past and the *nominal* system only; the *actual* one may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ndp_gym.batch import Simulator
from ndp_gym.budget import HbmBudget, check_fits
from ndp_gym.condition import Condition
from ndp_gym.conditions import Conditions
from ndp_gym.cost import PrefillParts, prefill_parts
from ndp_gym.machines import Machines
from ndp_gym.memory import Memory, PromptCounts, gate_profile
from ndp_gym.outcome import Outcome
from ndp_gym.packing import window_arrays
from ndp_gym.policy import CONTEXT_NAMES
from ndp_gym.quality import QualityModel
from ndp_gym.schedule import Schedule, Scheduling, check_count
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.trace import RoutingTrace

__all__ = ["CONTEXT_NAMES", "Lanes", "Observations", "check_agreement"]

_VARIABLE = CONTEXT_NAMES.index("n_live")  # from this entry on they change with the window

if TYPE_CHECKING:
    from ndp_gym.kernel_data import Windows

Observations = dict[str, NDArray[np.float32]]


class Lanes:
    """N independent episodes over one recording that advance together, one decode window at a time.

    Args:
        trace: the recording; must agree with ``model`` in routed layers, experts and top-k.
        model: sizes and structure.
        system: nominal system, the one policies are told.
        n_lanes: episodes N.
        batch_size: slots of each.
        window: decode steps W per plan.
        hbm_budget: bytes (int), share of all routed-expert bytes at 16 bit (float in (0, 1]), or
            ``"auto"``.
        scheduling: ``"continuous"`` or ``"static"`` batching.
        quality: error model.
        quality_weight: 1 / nat; only shown to policies here.
        conditions: what episodes will be drawn from, so that there is room for all of them.

    Attributes:
        base: the `Condition` that the arguments describe, which episodes have by default.
        conditions: [N] what each lane runs under.
        batch_size: slots B that every lane has room for, the largest there may be.
        machines: which machine runs each lane; ``quality_weights``, ``n_windows`` and ``actual``
            are its.
        drawn_from: the conditions given; widest: the widest of them.
        admitted: [N, B] slots whose request was admitted since the last window.
        waited_s: [N, B] seconds of prefills up to and including that request's own, 0 elsewhere.
        has_admitted: whether any lane has such a slot.
        outcome: the last window's, with a lane axis; ``None`` before the first.
        last_slots: request index and rows of every slot in the last window, [N, B] each.
        gates: how gate weights were obtained: "recorded", "rank profile of ..." or "uniform".

    Raises:
        ValueError: trace and model disagree, replicas or KV do not fit, or an argument is out of
            range.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        model: MoESpec,
        system: SystemSpec,
        *,
        n_lanes: int = 1,
        batch_size: int = 8,
        window: int = 16,
        hbm_budget: HbmBudget = 0.10,
        scheduling: Scheduling = "continuous",
        quality: QualityModel | None = None,
        quality_weight: float = 4.0,
        conditions: Conditions | None = None,
    ) -> None:
        """Check that everything fits; every lane then waits for `reset`."""
        for name, value in (("n_lanes", n_lanes), ("batch_size", batch_size), ("window", window)):
            check_count(name, value)
        check_agreement(trace, model)
        self.base = Condition(
            system=system,
            batch_size=batch_size,
            hbm_budget=hbm_budget,
            quality_weight=quality_weight,
        )
        self.drawn_from = conditions or Conditions()
        self.widest = widest = self.drawn_from.widest(self.base)
        batch_size = widest.batch_size
        check_fits(trace, model, system, widest.hbm_budget, batch_size, widest.extra_context)
        self.trace, self.model, self.system = trace, model, system
        self.n_lanes, self.batch_size, self.window = n_lanes, batch_size, window
        self.shape = (model.n_layers, model.n_experts)
        self.simulator = Simulator(model, system, quality or QualityModel(), n_lanes=n_lanes)
        self.schedule = Schedule(
            trace.requests,
            n_lanes=n_lanes,
            batch_size=batch_size,
            window=window,
            scheduling=scheduling,
        )
        profile, self.gates = gate_profile(trace, model)
        self.machines = Machines(model, self.base, n_lanes, window)
        self.conditions = self.machines.conditions
        self.quality_weights = self.machines.quality_weights
        self.n_windows = self.machines.n_windows
        self.actual = self.machines.actual
        self.admitted = np.zeros((n_lanes, batch_size), np.bool_)
        self.waited_s = np.zeros((n_lanes, batch_size))
        self.has_admitted = False
        self.outcome: Outcome | None = None
        self.last_slots = self.schedule.request.copy(), np.zeros((n_lanes, batch_size), np.int64)
        self._memory = Memory(n_lanes, batch_size, self.shape)
        self._prompts = PromptCounts(trace, profile)
        self._loops = import_module("ndp_gym.lane_loops")  # numba comes with it
        self._services = (system.default_service,) * n_lanes
        self._recording = window_arrays(
            trace.expert_ids, trace.gate_weights, profile, *np.zeros((3, 1, 1), np.int64)
        )
        self._bytes_of = np.zeros(17, np.int64)
        self._bytes_of[list(system.stored_bits)] = self.simulator.costs[0].prices.table.weight_bytes

    def reset(
        self,
        lane: int,
        order: NDArray[np.int64],
        condition: Condition | None = None,
    ) -> None:
        """Start an episode on one lane: empty HBM, the requests ``order`` in line.

        ``condition`` is `base` if ``None``; its budget is not checked against KV.

        Raises:
            ValueError: the condition has more slots or other stored widths than there is room for.
        """
        condition = condition or self.base
        self._check_room(condition)
        self.machines.reset(lane, condition)
        self.simulator.reset(lane, self.actual[lane])
        self._memory.forget(lane)
        self._forget_waits(lane)
        slots = self.schedule.reset(lane, order, condition.batch_size, condition.extra_context)
        self._admit(lane, slots)
        self.machines.settle_budgets(self.schedule.context, changed=True)

    @property
    def prefill_s(self) -> list[list[float]]:
        """Per lane, seconds of each prefill since its last window, in order of admission."""
        return [
            np.diff(waited[admitted], prepend=0.0).tolist()
            for waited, admitted in zip(self.waited_s, self.admitted, strict=True)
        ]

    def clear(self, lane: int) -> None:
        """Take the requests off one lane, which idles until `reset`."""
        self.schedule.clear(lane)

    @property
    def is_done(self) -> NDArray[np.bool_]:
        """[N] lanes whose requests have all ended."""
        return self.schedule.is_done()

    def budgets(self) -> NDArray[np.int64]:
        """[N] HBM bytes for experts in the coming window."""
        return self.machines.budgets.copy()

    def advance(
        self,
        tier: NDArray[np.uint8],
        bits: NDArray[np.uint8],
        order: NDArray[np.float64] | None = None,
        services: Sequence[Service] | None = None,
    ) -> Outcome:
        """Replay one window on every lane: tier, bits, order [N, L, E], one service per lane.

        ``order`` ``None`` ranks by the load of the last window, of prefill at first; ``services``
        ``None`` is the system's default. Afterwards ended requests have left and waiting ones are
        admitted.
        """
        n_rows = self.schedule.n_rows()
        outcome = self.simulator.advance(
            tier=tier,
            bits=bits,
            order=self.default_order() if order is None else order,
            services=services or self._services,
            windows=self._windows(n_rows),
            length=self.window,
            budgets=self.machines.budgets,
        )
        self.last_slots = self.schedule.request.copy(), n_rows
        self.outcome = outcome
        self._memory.remember(outcome)
        changed = self.machines.advance()
        for lane in changed:
            self.simulator.put_system(lane, self.actual[lane])
        self._next_slots()
        self.machines.settle_budgets(self.schedule.context, changed=bool(changed))
        return outcome

    def default_order(self) -> NDArray[np.float64]:
        """[N, L, E] tokens per decode step in the last window, or as prefill has it."""
        memory = self._memory
        if memory.has_history.all():
            return memory.last_load
        return np.where(memory.has_history[:, None, None], memory.last_load, memory.prefill_load)

    def observe(self) -> Observations:
        """What policies see now, each array with a leading lane axis; fresh arrays every time."""
        loops = self._loops
        state, memory, schedule = self.simulator.state, self._memory, self.schedule
        planes = np.empty((len(loops.PLANES), self.n_lanes, *self.shape), np.float32)
        context = self.machines.facts.copy()
        loops.observe(
            memory.loads, (state.hbm, state.far, state.target, state.scalars), self._bytes_of,
            schedule.left, schedule.context, memory.n_admitted, schedule.generated,
            memory.fetch_bytes, planes, context[:, _VARIABLE:],
        )  # fmt: skip
        return {
            "prefill_load": memory.prefill_load.copy(),
            **dict(zip(loops.PLANES, planes, strict=True)),
            "layer": memory.layer.copy(),
            "context": context,
        }

    def next_counts(self, lane: int) -> NDArray[np.int32]:
        """[W, L, E] tokens per expert in one lane's coming window; for oracles only."""
        from ndp_gym.kernel import count_window, empty_counts

        counts = empty_counts(self.window, *self.shape, self.batch_size, self.trace.top_k)
        count_window(self._windows(self.schedule.n_rows()), lane, self.shape[1], counts)
        return np.asarray(counts.tokens).reshape(self.window, *self.shape)

    def _windows(self, n_rows: NDArray[np.int64]) -> Windows:
        """Where the rows of the coming window stand in the recording."""
        schedule = self.schedule
        return self._recording._replace(
            first_row=schedule.row, n_rows=n_rows, context=schedule.context
        )

    def _next_slots(self) -> None:
        """Retire requests, admit others, and learn from the prompts of those."""
        ended = self.schedule.advance()
        if self.has_admitted:
            self._forget_waits(slice(None))
            self.has_admitted = False
        for lane in ended:
            self._admit(lane, self.schedule.admit(lane))

    def _admit(self, lane: int, slots: list[int]) -> None:
        """Prefill the requests just admitted to ``slots``: what policies learn, and its seconds."""
        memory, requests = self._memory, self.schedule.request[lane]
        hbm, waited_s = self.simulator.state.hbm[lane], 0.0
        for slot in slots:
            index = int(requests[slot])
            memory.admit(lane, slot, *self._prompts(index))
            parts = _prefill(
                self.model, self.actual[lane], int(self.trace.requests.n_prompt[index])
            )
            waited_s += self._loops.prefill_seconds(*parts, hbm, self.shape[0])
            self.waited_s[lane, slot] = waited_s
            self.admitted[lane, slot] = True
        self.has_admitted = self.has_admitted or bool(slots)
        memory.settle(lane, requests)

    def _forget_waits(self, lanes: int | slice) -> None:
        self.admitted[lanes] = False
        self.waited_s[lanes] = 0.0

    def _check_room(self, condition: Condition) -> None:
        if condition.batch_size > self.batch_size:
            raise ValueError(
                f"condition must have batch_size <= {self.batch_size} slots, "
                f"got {condition.batch_size}"
            )
        widths = self.system.stored_bits
        for system in (condition.system, condition.actual or condition.system):
            if system is not self.system and system.stored_bits != widths:
                raise ValueError(
                    f"condition must have a system of stored_bits {widths}, "
                    f"got {system.stored_bits}"
                )


@lru_cache(maxsize=4096)
def _prefill(model: MoESpec, system: SystemSpec, n_prompt: int) -> PrefillParts:
    """`prefill_parts`, kept for the next request of that length."""
    return prefill_parts(model, system, n_prompt)


def check_agreement(trace: RoutingTrace, model: MoESpec) -> None:
    """Raise ``ValueError`` unless trace and model agree in routed layers, experts and top-k."""
    for name in ("n_layers", "n_experts", "top_k"):
        recorded, expected = getattr(trace, name), getattr(model, name)
        if recorded != expected:
            raise ValueError(
                f"trace and model must agree in {name}: {trace.name} has {recorded}, "
                f"{model.name!r} has {expected}"
            )
