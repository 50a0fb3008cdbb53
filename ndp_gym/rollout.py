"""One policy over one recording, window by window, and the sums a result row is made of.

The one loop for heuristics, oracles and agents: observation -> policy -> `Lanes.advance`. It knows
no other policy, so nothing here compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym import policy_calls
from ndp_gym.budget import HbmBudget
from ndp_gym.condition import Condition
from ndp_gym.lanes import Lanes
from ndp_gym.outcome import Outcome
from ndp_gym.patterns import train_patterns
from ndp_gym.plan import FAR, HBM, Plan
from ndp_gym.policy import Policy, PolicyContext, needs_future
from ndp_gym.quality import QualityModel
from ndp_gym.reward import reward_terms
from ndp_gym.schedule import Scheduling
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_counts import decode_counts, train_profile

__all__ = ["Measurement", "Replayed", "Task", "run_policy", "train_profile"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TokenProgress = Callable[[int, int], None]
"""Called after every window with tokens decoded so far and tokens of the whole run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every policy of a comparison faces: recording, machine, batching, budget.

    Attributes:
        trace: the recording; requests of ``split`` run in file order, or in ``order``.
        model: nominal model.
        system: nominal system, the one policies are told.
        actual: the system that runs, ``None`` where that is the nominal one.
        batch_size: slots.
        window: decode steps per plan.
        hbm_budget: bytes, share or ``"auto"``, see `Lanes`.
        split: ``train``, ``val`` or ``test``.
        scheduling: ``continuous`` or ``static``.
        quality: error model.
        kappa_given: whether its kappa was chosen for this system's format, or is the default.
        quality_weight: reward lost per nat.
        max_windows: stop after so many windows, ``None`` at the end of the requests.
        profile: train profile [L, E], ``None`` where there is no train split.
        profile_source: where the profile is from, ``None`` where that is the train split.
        condition: what else the run is under, see `under`.
        order: indices of the requests that run, in place of those of ``split``.
    """

    trace: RoutingTrace
    model: MoESpec
    system: SystemSpec
    actual: SystemSpec | None = None
    batch_size: int
    window: int
    hbm_budget: HbmBudget
    split: str
    scheduling: Scheduling
    quality: QualityModel
    quality_weight: float
    max_windows: int | None
    profile: FloatArray | None
    profile_source: str | None = None
    kappa_given: bool = True
    condition: Condition | None = None
    order: IntArray | None = None

    def under(self, condition: Condition, order: IntArray | None = None) -> Task:
        """The same task under ``condition``, whose nominal facts replace those of the task."""
        return replace(
            self,
            system=condition.system,
            actual=condition.actual,
            batch_size=condition.batch_size,
            hbm_budget=condition.hbm_budget,
            quality_weight=condition.quality_weight,
            condition=condition,
            order=order,
        )

    def start(self) -> tuple[Lanes, IntArray]:
        """A fresh single lane at the start of the run, and the requests in its order."""
        order = self.trace.split_requests(self.split) if self.order is None else self.order
        lanes = Lanes(
            self.trace,
            self.model,
            self.system,
            n_lanes=1,
            batch_size=self.batch_size,
            window=self.window,
            hbm_budget=self.hbm_budget,
            scheduling=self.scheduling,
            quality=self.quality,
            quality_weight=self.quality_weight,
        )
        condition = self.condition or replace(lanes.base, actual=self.actual)
        if condition.system is not self.system:
            raise ValueError("a task's condition must have the task's system: see Task.under")
        lanes.reset(0, order, condition)
        return lanes, order


class Replayed(NamedTuple):
    """One window of a run, with what is needed to replay it otherwise.

    Attributes:
        plan: what the policy answered.
        wanted: [L, E] HBM widths wanted after repair, 0 where the expert stays far.
        budget_bytes: of HBM.
        first_row, n_rows, context: [B] rows of the recording, see `ndp_gym.state.Window`.
        outcome: what it cost.
        system: what ran.
    """

    plan: Plan
    wanted: NDArray[np.uint8]
    budget_bytes: int
    first_row: NDArray[np.int64]
    n_rows: NDArray[np.int64]
    context: NDArray[np.int64]
    outcome: Outcome
    system: SystemSpec


Watch = Callable[[Replayed], None]


@dataclass(kw_only=True, eq=False)
class Measurement:
    """Sums over the windows of one run, or of several runs pooled by `add`.

    Attributes:
        totals: sums of `Outcome` fields and derived seconds and bytes, by name; ``demanded_bytes``
            are the fetched ones that served, without what a prefetch copied in vain.
        served: [2, NB] routed tokens by tier and stored width.
        tokens, seconds, loss: [C] per conversation, in order of first admission: tokens, seconds
            and tokens times ΔNLL, each window's share in proportion to tokens.
        step_s: seconds of every decode step in which a token was decoded.
        ttft_s: seconds of every request's first load (first window only) and prefills up to its
            own; time spent waiting for a slot is not in it.
        decision_s: seconds of every call of the policy.
        terms: reward terms of every window.
        min_budget_bytes: smallest HBM budget of any window.
        gates: how gate weights were obtained.
        used_rng: whether the policy drew random numbers, so that another seed may differ.
        sees_future: whether the policy is an oracle.
        services: kinds of service that plans used, and "prefetch" where one did.
        n_runs: runs pooled.
    """

    totals: dict[str, float]
    served: NDArray[np.int64]
    tokens: FloatArray
    seconds: FloatArray
    loss: FloatArray
    step_s: list[FloatArray] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    decision_s: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    min_budget_bytes: int = 2**62
    gates: str = ""
    used_rng: bool = False
    sees_future: bool = False
    services: set[str] = field(default_factory=set)
    n_runs: int = 1

    def add(self, other: Measurement) -> None:
        """Pool another run of the same task into this one."""
        for name, value in other.totals.items():
            self.totals[name] += value
        self.served = self.served + other.served
        self.tokens, self.seconds = self.tokens + other.tokens, self.seconds + other.seconds
        self.loss = self.loss + other.loss
        self.step_s += other.step_s
        self.ttft_s += other.ttft_s
        self.decision_s += other.decision_s
        for name, values in other.terms.items():
            self.terms[name] += values
        self.min_budget_bytes = min(self.min_budget_bytes, other.min_budget_bytes)
        self.services |= other.services
        self.n_runs += other.n_runs


_SUMMED = (
    "tokens", "decode_s", "load_s", "load_bytes", "requantise_s", "routed", "hits",
    "hbm_weight_bytes", "far_weight_bytes", "activation_bytes", "fetch_bytes", "migration_bytes",
    "wasted_bytes", "n_repaired", "energy_j",
)  # fmt: skip


def run_policy(
    policy: Policy,
    task: Task,
    *,
    seed: int | Sequence[int],
    name: str | None = None,
    progress: TokenProgress | None = None,
    watch: Watch | None = None,
) -> Measurement:
    """Run ``policy`` over the requests of the task, in its order, and sum what it cost.

    ``name`` is what errors call it, by default that of its class. ``watch`` is shown every window.

    Raises:
        PolicyError: the policy fails, or its plan does not fit model or system.
        ValueError: the policy says that it has no plan here (`InfeasibleError`,
            `MissingProfileError`).
    """
    name = name or type(policy).__name__
    lanes, order = task.start()
    requests = task.trace.requests
    rng = np.random.default_rng(seed)
    untouched = _draws(rng)
    policy_calls.reset(name, policy, _context(policy, task, lanes, order, rng))
    column, n_conversations = _columns(requests.conversation, order)
    result = _empty(n_conversations, len(task.system.stored_bits), lanes.gates)
    n_tokens = int(requests.n_decode[order].sum())
    while not lanes.is_done[0] and result.totals["n_windows"] != task.max_windows:
        _window(name, policy, task, lanes, result, column, watch)
        if progress is not None:
            progress(int(result.totals["tokens"]), n_tokens)
    result.used_rng, result.sees_future = _draws(rng) != untouched, needs_future(policy)
    return result


def _columns(conversation: IntArray, order: IntArray) -> tuple[IntArray, int]:
    """Place of each request's conversation by first admission (-1 where not run), and how many."""
    _, first, of_request = np.unique(conversation[order], return_index=True, return_inverse=True)
    column = np.full(len(conversation), -1)
    column[order] = np.argsort(np.argsort(first))[of_request]
    return column, len(first)


def _window(
    name: str,
    policy: Policy,
    task: Task,
    lanes: Lanes,
    result: Measurement,
    column: NDArray[np.int64],
    watch: Watch | None,
) -> None:
    """One decision, one window, and what is remembered of it."""
    observation = {name: array[0] for name, array in lanes.observe().items()}
    before = time.perf_counter()
    plan = policy_calls.ask(name, policy, observation)
    result.decision_s.append(time.perf_counter() - before)
    policy_calls.check_answer(name, plan, task.model, task.system)
    service = plan.service or task.system.default_service
    result.services |= {service.kind} | ({"prefetch"} if service.prefetch is not None else set())
    budget_bytes = int(lanes.budgets()[0])
    result.min_budget_bytes = min(result.min_budget_bytes, budget_bytes)
    schedule = lanes.schedule
    rows = schedule.row[0].copy(), schedule.n_rows()[0], schedule.context[0].copy()
    prefills, system = np.cumsum(lanes.prefill_s[0]), lanes.actual[0]
    outcome = _advance(lanes, plan)
    if watch is not None:
        wanted = lanes.simulator.state.target[0].reshape(lanes.shape).copy()
        watch(Replayed(plan, wanted, budget_bytes, *rows, outcome, system))
    result.ttft_s += [float(outcome.load_s + waited) for waited in prefills]
    result.step_s.append(outcome.step_s[outcome.step_tokens > 0])
    result.served = result.served + outcome.served_tokens
    for term, value in reward_terms(outcome).items():
        result.terms.setdefault(term, []).append(float(value))
    _add_totals(result.totals, outcome, system)
    result.totals["demanded_bytes"] += int(outcome.fetch_bytes / _copied_per_needed(service))
    slots, n_rows = (array[0] for array in lanes.last_slots)
    for field_name, amount in (
        ("tokens", float(outcome.tokens)),
        ("seconds", float(outcome.decode_s)),
        ("loss", float(outcome.delta_nll * outcome.tokens)),
    ):
        np.add.at(getattr(result, field_name), column[slots], amount * n_rows / n_rows.sum())


def _advance(lanes: Lanes, plan: Plan) -> Outcome:
    order = None if plan.migration_order is None else plan.migration_order[None]
    services = None if plan.service is None else (plan.service,)
    placement = plan.placement
    return lanes.advance(placement.tier[None], placement.bitwidth[None], order, services).lane(0)


def _copied_per_needed(service: Service) -> float:
    """Fetched bytes per byte that was needed: more than one where a prefetch copies in vain.

    The kernel rounds the bytes in vain down once per layer and step, so that bytes divided by this
    fall short of those needed by less than one byte each time, and never exceed them.
    """
    foreseen = service.prefetch
    return 1.0 if foreseen is None else 1.0 + foreseen.recall * (1.0 / foreseen.precision - 1.0)


def _add_totals(totals: dict[str, float], outcome: Outcome, system: SystemSpec) -> None:
    for name in _SUMMED:
        totals[name] += getattr(outcome, name).item()
    n_steps = int((outcome.step_tokens > 0).sum())
    engine_s = n_steps * system.engine_base_s + outcome.tokens * system.engine_token_s
    idle_s = engine_s + outcome.requantise_s + outcome.stall_s.sum()
    totals["gpu_busy_s"] += float(outcome.decode_s - idle_s)
    totals["far_busy_s"] += float(outcome.far_s.sum() + outcome.requantise_s)
    migration_s = outcome.migration_bytes / system.link.bandwidth_bytes_per_s
    totals["link_busy_s"] += float(outcome.link_s.sum() + migration_s)
    totals["n_windows"] += 1


def _empty(n_conversations: int, n_widths: int, gates: str) -> Measurement:
    names = (*_SUMMED, "gpu_busy_s", "far_busy_s", "link_busy_s", "n_windows", "demanded_bytes")
    return Measurement(
        totals=dict.fromkeys(names, 0),
        served=np.zeros((2, n_widths), np.int64),
        tokens=np.zeros(n_conversations),
        seconds=np.zeros(n_conversations),
        loss=np.zeros(n_conversations),
        gates=gates,
    )


def _context(
    policy: Policy,
    task: Task,
    lanes: Lanes,
    order: NDArray[np.int64],
    rng: np.random.Generator,
) -> PolicyContext:
    """What the policy is told; the future only where it declares itself an oracle."""
    widths = task.system.stored_bits
    context = PolicyContext(
        model=task.model,
        system=task.system,
        batch_size=task.batch_size,
        window=task.window,
        hbm_budget_bytes=int(lanes.budgets()[0]),
        quality=task.quality,
        quality_weight=task.quality_weight,
        menu=tuple((tier, bits) for tier in (HBM, FAR) for bits in widths),
        rng=rng,
        profile=task.profile,
        patterns=partial(train_patterns, task.trace, task.model),
    )
    return replace(context, future=_LaneFuture(lanes, order)) if needs_future(policy) else context


class _LaneFuture:
    """The rest of a single-lane run, for oracles."""

    def __init__(self, lanes: Lanes, order: NDArray[np.int64]) -> None:
        self._lanes, self._order = lanes, order

    @property
    def total_load(self) -> FloatArray:
        """[L, E] tokens per expert over all decode rows of the run's requests."""
        return decode_counts(self._lanes.trace, self._order)

    def next_counts(self) -> NDArray[np.int64]:
        """[W, L, E] tokens per expert in each decode step of the coming window."""
        return self._lanes.next_counts(0).astype(np.int64)


def _draws(rng: np.random.Generator) -> tuple[object, object]:
    """A fingerprint that changes when ``rng`` draws or spawns."""
    seed_seq = rng.bit_generator.seed_seq
    return repr(rng.bit_generator.state), getattr(seed_seq, "n_children_spawned", 0)
