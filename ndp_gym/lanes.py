"""`Lanes`: N copies of the one environment, without Gymnasium.

They own the schedule, the simulator and what policies may see.

The single env is N = 1; the vector env, evaluation and oracles use the same object. An
observation holds facts of the past and the *nominal* system only; the *actual* one may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ndp_gym.batch import Simulator
from ndp_gym.budget import HbmBudget, auto_budgets_bytes, check_fits, fixed_budget_bytes
from ndp_gym.cost import prefill_table_s
from ndp_gym.memory import Memory, PromptCounts, gate_profile
from ndp_gym.outcome import Outcome
from ndp_gym.packing import window_arrays
from ndp_gym.policy import CONTEXT_NAMES
from ndp_gym.quality import QualityModel
from ndp_gym.schedule import Schedule, Scheduling, check_count
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.trace import RoutingTrace

__all__ = ["CONTEXT_NAMES", "Lanes", "Observations", "check_agreement", "toward_zero"]

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
        batch_size: slots B of each.
        window: decode steps W per plan.
        hbm_budget: bytes (int), share of all routed-expert bytes at 16 bit (float in (0, 1]), or
            ``"auto"``.
        scheduling: ``"continuous"`` or ``"static"`` batching.
        quality: error model.
        quality_weight: 1 / nat; only shown to policies here.

    Attributes:
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
    ) -> None:
        """Check that everything fits; every lane then waits for `reset`."""
        for name, value in (("n_lanes", n_lanes), ("batch_size", batch_size), ("window", window)):
            check_count(name, value)
        check_agreement(trace, model)
        check_fits(trace, model, system, hbm_budget, batch_size)
        self.trace, self.model, self.system = trace, model, system
        self.n_lanes, self.batch_size, self.window = n_lanes, batch_size, window
        self.quality_weight = quality_weight
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
        self._default_budget = hbm_budget
        self._budgets = np.zeros(n_lanes, np.int64)
        self._is_auto = np.zeros(n_lanes, np.bool_)
        self._has_auto = False
        self.actual = [system] * n_lanes
        self.admitted = np.zeros((n_lanes, batch_size), np.bool_)
        self.waited_s = np.zeros((n_lanes, batch_size))
        self.has_admitted = False
        self.outcome: Outcome | None = None
        self.last_slots = self.schedule.request.copy(), np.zeros((n_lanes, batch_size), np.int64)
        self._memory = Memory(n_lanes, batch_size, self.shape)
        self._prompts = PromptCounts(trace, profile)
        self._prefill_tables: dict[SystemSpec, dict[int, NDArray[np.float64]]] = {system: {}}
        self._tables = [self._prefill_tables[system]] * n_lanes
        self._loops = import_module("ndp_gym.lane_loops")  # numba comes with it
        self._services = (system.default_service,) * n_lanes
        self._recording = window_arrays(
            trace.expert_ids, trace.gate_weights, profile, *np.zeros((3, 1, 1), np.int64)
        )
        self._bytes_of = np.zeros(17, np.int64)
        self._bytes_of[list(system.stored_bits)] = self.simulator.costs[0].prices.table.weight_bytes
        self._facts = self._nominal_facts()

    def reset(
        self,
        lane: int,
        order: NDArray[np.int64],
        actual: SystemSpec | None = None,
        hbm_budget: HbmBudget | None = None,
    ) -> None:
        """Start an episode on one lane: empty HBM, the requests ``order`` in line.

        ``actual`` is the system that really runs (the nominal one if ``None``); ``hbm_budget``
        replaces, for this episode, the one given at construction, and is not checked against KV.
        """
        self.actual[lane] = actual or self.system
        self._tables[lane] = self._prefill_tables.setdefault(self.actual[lane], {})
        self.simulator.reset(lane, self.actual[lane])
        self._memory.forget(lane)
        self._forget_waits(lane)
        self._admit(lane, self.schedule.reset(lane, order))
        budget = self._default_budget if hbm_budget is None else hbm_budget
        fixed = fixed_budget_bytes(budget, self.model)
        self._is_auto[lane] = fixed is None
        self._has_auto = bool(self._is_auto.any())
        self._budgets[lane] = fixed or 0
        self._settle_budgets()

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
        return self._budgets.copy()

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
            budgets=self._budgets,
        )
        self.last_slots = self.schedule.request.copy(), n_rows
        self.outcome = outcome
        self._memory.remember(outcome)
        self._next_slots()
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
        context = self._facts.copy()
        loops.observe(
            memory.loads, (state.hbm, state.far, state.target, state.scalars), self._bytes_of,
            schedule.left, schedule.context, memory.n_admitted, schedule.generated, planes,
            context[:, _VARIABLE:],
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
        if self._has_auto:
            self._settle_budgets()

    def _admit(self, lane: int, slots: list[int]) -> None:
        """Prefill the requests just admitted to ``slots``: what policies learn, and its seconds."""
        memory, requests = self._memory, self.schedule.request[lane]
        hbm, waited_s = self.simulator.state.hbm[lane], 0.0
        for slot in slots:
            index = int(requests[slot])
            memory.admit(lane, slot, *self._prompts(index))
            table_s = self._prefill_table_s(lane, index)
            waited_s += self._loops.prefill_seconds(table_s, hbm, self.shape[0])
            self.waited_s[lane, slot] = waited_s
            self.admitted[lane, slot] = True
        self.has_admitted = self.has_admitted or bool(slots)
        memory.settle(lane, requests)

    def _forget_waits(self, lanes: int | slice) -> None:
        self.admitted[lanes] = False
        self.waited_s[lanes] = 0.0

    def _prefill_table_s(self, lane: int, index: int) -> NDArray[np.float64]:
        """Seconds per layer by number of resident experts, kept by system and prompt length."""
        tables, n_prompt = self._tables[lane], int(self.trace.requests.n_prompt[index])
        if n_prompt not in tables:
            tables[n_prompt] = prefill_table_s(self.model, self.actual[lane], n_prompt)
        return tables[n_prompt]

    def _nominal_facts(self) -> NDArray[np.float32]:
        gpu, far, link = self.system.gpu, self.system.far, self.system.link
        facts = dict.fromkeys(CONTEXT_NAMES, 0.0)
        facts |= {
            "batch_size": self.batch_size,
            "window": self.window,
            "gpu_bytes_per_s": gpu.bandwidth_bytes_per_s,
            "gpu_flops_per_s": gpu.flops_per_s,
            "far_bytes_per_s": far.bandwidth_bytes_per_s * far.efficiency,
            "far_flops_per_s": far.flops_per_s,
            "link_bytes_per_s": link.bandwidth_bytes_per_s,
            "link_latency_s": link.latency_s,
            "quality_weight": self.quality_weight,
        }
        return np.tile(np.array(list(facts.values()), np.float32), (self.n_lanes, 1))

    def _settle_budgets(self) -> None:
        """Automatic budgets for the contexts of now, and what the observation says of them all."""
        if self._has_auto:
            contexts = self.schedule.context
            auto = auto_budgets_bytes(self.model, self.system, contexts, self.window)
            self._budgets[self._is_auto] = auto[self._is_auto]
        self._facts[:, 0] = toward_zero(self._budgets)
        self._facts[:, 1] = self._budgets / self.model.routed_bytes16


def check_agreement(trace: RoutingTrace, model: MoESpec) -> None:
    """Raise ``ValueError`` unless trace and model agree in routed layers, experts and top-k."""
    for name in ("n_layers", "n_experts", "top_k"):
        recorded, expected = getattr(trace, name), getattr(model, name)
        if recorded != expected:
            raise ValueError(
                f"trace and model must agree in {name}: {trace.name} has {recorded}, "
                f"{model.name!r} has {expected}"
            )


def toward_zero(values: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 of non-negative integers, never larger than they are."""
    rounded = values.astype(np.float32)
    too_large = rounded.astype(np.float64) > values
    if not too_large.any():
        return rounded
    return np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded)
