"""`Lanes`: N copies of the one environment, without Gymnasium.

They own the schedule, the simulator and what policies may see.

The single env is N = 1; the vector env, evaluation and oracles use the same object. An
observation holds facts of the past and the *nominal* system only; the *actual* one may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ndp_gym.batch import Simulator, window_arrays
from ndp_gym.budget import HbmBudget, budgets_bytes, check_fits, fixed_budget_bytes
from ndp_gym.cost import prefill_s
from ndp_gym.memory import Memory, gate_profile, prefill_counts
from ndp_gym.outcome import Outcome
from ndp_gym.quality import QualityModel
from ndp_gym.schedule import Schedule, Scheduling
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.trace import RoutingTrace

CONTEXT_NAMES = (
    "hbm_budget_bytes",
    "hbm_budget_share",
    "batch_size",
    "window",
    "gpu_bytes_per_s",
    "gpu_flops_per_s",
    "far_bytes_per_s",
    "far_flops_per_s",
    "link_bytes_per_s",
    "link_latency_s",
    "quality_weight",
    "n_live",
    "n_admitted",
    "mean_context",
    "tokens_generated",
    "in_flight_bytes",
)
"""Entries of the observation's ``context`` vector; SI units, budget rounded toward zero."""
if TYPE_CHECKING:
    from ndp_gym.kernel import Windows

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
        prefill_s: per lane, seconds of each prefill since its last window, in order of admission.
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
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
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
        self.gate_profile, self.gates = gate_profile(trace, model)
        self.fixed_budget = fixed_budget_bytes(hbm_budget, model)
        self.actual = [system] * n_lanes
        self.prefill_s: list[list[float]] = [[] for _ in range(n_lanes)]
        self.outcome: Outcome | None = None
        self.last_slots = self.schedule.request.copy(), np.zeros((n_lanes, batch_size), np.int64)
        self._memory = Memory(n_lanes, batch_size, self.shape)
        self._facts = self._nominal_facts()

    def reset(self, lane: int, order: NDArray[np.int64], actual: SystemSpec | None = None) -> None:
        """Start an episode on one lane: empty HBM, the requests ``order`` in line.

        ``actual`` is the system that really runs (the nominal one if ``None``).
        """
        self.actual[lane] = actual or self.system
        self.simulator.reset(lane, self.actual[lane])
        self._memory.forget(lane)
        self._admit(lane, self.schedule.reset(lane, order))

    @property
    def is_done(self) -> NDArray[np.bool_]:
        """[N] lanes whose requests have all ended."""
        return self.schedule.is_done()

    def budgets(self) -> NDArray[np.int64]:
        """[N] HBM bytes for experts in the coming window."""
        contexts = self.schedule.contexts()
        return budgets_bytes(self.fixed_budget, self.model, self.system, contexts, self.window)

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
        first_row, n_rows, context = self.schedule.next_rows()
        outcome = self.simulator.advance(
            tier=tier,
            bits=bits,
            order=self.default_order() if order is None else order,
            services=services or (self.system.default_service,) * self.n_lanes,
            windows=self._windows(first_row, n_rows, context),
            length=self.window,
            budgets=self.budgets(),
        )
        self.last_slots = self.schedule.request.copy(), n_rows
        self.outcome = outcome
        self._memory.remember(outcome)
        self.schedule.advance()
        for lane in range(self.n_lanes):
            self.prefill_s[lane] = []
            self._memory.n_admitted[lane] = 0
            if (self.schedule.request[lane] < 0).any():
                self._admit(lane, self.schedule.admit(lane))
        return outcome

    def default_order(self) -> NDArray[np.float64]:
        """[N, L, E] tokens per decode step in the last window, or as prefill has it."""
        seen = self._memory.has_history[:, None, None]
        return np.where(
            seen, self._memory.last_load, self._memory.prefill_load(self.schedule.live())
        )

    def observe(self) -> Observations:
        """What policies see now, each array with a leading lane axis; fresh arrays every time."""
        live = self.schedule.live()
        state, memory = self.simulator.state, self._memory
        experts = (self.n_lanes, *self.shape)
        in_flight = (state.target != state.hbm) & (state.target != 0)
        prefill_load = memory.prefill_load(live)
        has_copy = state.hbm != 0
        return {
            "prefill_load": prefill_load,
            "last_load": memory.last_load.astype(np.float32),
            "ema_load": memory.ema_load.astype(np.float32),
            "gate_share": memory.gate_share(live),
            "tier": (~has_copy).astype(np.float32).reshape(experts),
            "bitwidth": np.where(has_copy, state.hbm, state.far)
            .astype(np.float32)
            .reshape(experts),
            "in_flight": in_flight.astype(np.float32).reshape(experts),
            "layer": memory.layer.copy(),
            "context": self._context(live, in_flight),
        }

    def next_counts(self, lane: int) -> NDArray[np.int32]:
        """[W, L, E] tokens per expert in one lane's coming window; for oracles only."""
        from ndp_gym.kernel import count_window, empty_counts

        counts = empty_counts(self.window, *self.shape, self.batch_size, self.trace.top_k)
        count_window(self._windows(*self.schedule.next_rows()), lane, self.shape[1], counts)
        return np.asarray(counts.tokens).reshape(self.window, *self.shape)

    def _windows(
        self, first_row: NDArray[np.int64], n_rows: NDArray[np.int64], context: NDArray[np.int64]
    ) -> Windows:
        return window_arrays(
            self.trace.expert_ids,
            self.trace.gate_weights,
            self.gate_profile,
            first_row,
            n_rows,
            context,
        )

    def _admit(self, lane: int, slots: list[int]) -> None:
        """Prefill the requests just admitted to ``slots``: what policies learn, and its seconds."""
        requests = self.trace.requests
        resident = (self.simulator.state.hbm[lane].reshape(self.shape) != 0).sum(axis=1)
        self._memory.n_admitted[lane] = len(slots)
        for slot in slots:
            index = self.schedule.request[lane, slot]
            start, n_prompt = int(requests.start[index]), int(requests.n_prompt[index])
            self.trace.check_rows(
                requests.start[index : index + 1], requests.length[index : index + 1]
            )
            load, energy = prefill_counts(self.trace, start, n_prompt, self.gate_profile)
            self._memory.slot_load[lane, slot] = load
            self._memory.slot_energy[lane, slot] = energy
            self.prefill_s[lane].append(
                prefill_s(self.model, self.actual[lane], n_prompt, resident)
            )

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

    def _context(
        self, live: NDArray[np.bool_], in_flight: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        context = self._facts.copy()
        budgets = self.budgets()
        n_live = live.sum(axis=1)
        waiting = np.where(in_flight, self.simulator.state.target, 0)
        table = self.simulator.costs[0].prices.table
        bytes_of = np.zeros(17)
        bytes_of[table.bits] = table.weight_bytes
        in_flight_bytes = bytes_of[waiting].sum(axis=1) - self.simulator.state.scalars[:, 1]
        columns = {
            "hbm_budget_bytes": toward_zero(budgets),
            "hbm_budget_share": budgets / self.model.routed_bytes16,
            "n_live": n_live,
            "n_admitted": self._memory.n_admitted,
            "mean_context": self.schedule.contexts().sum(axis=1) / np.maximum(n_live, 1),
            "tokens_generated": self.schedule.generated,
            "in_flight_bytes": in_flight_bytes,
        }
        for name, column in columns.items():
            context[:, CONTEXT_NAMES.index(name)] = column
        return context


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
    return np.where(
        rounded.astype(np.float64) > values, np.nextafter(rounded, np.float32(0)), rounded
    )
