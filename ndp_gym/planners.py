"""The ``balance`` planner: which experts fill HBM, and at how many bits, as a function of loads.

In every layer HBM is filled only while the slower of GPU and far device gets faster, and widths are
bought where quality is cheapest in seconds. One price per HBM byte, shared by all layers, enforces
the budget. The planner sees expected loads and nominal costs; it never replays routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.allocation import (
    at,
    far_widths,
    keep_or_change,
    stage,
    target_of,
    within_budget,
    within_rations,
)
from ndp_gym.cost import CostTable, cost_table, expert_bytes, requantise_s
from ndp_gym.fillings import Fillings, Prices, Window, far_seconds, fillings, lost_at
from ndp_gym.forecast import Blend, Forecast
from ndp_gym.plan import FAR, HBM, Placement, Plan, nearest_width
from ndp_gym.quality import SUPER_EXPERT_NATS, QualityModel, layer_weights, rel_mse_table
from ndp_gym.rules import check_numbers
from ndp_gym.specs import MoESpec, Service, SystemSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MOVING = Service(kind="balance")
N_MORE, ENOUGH = 4, 3e-3
"""Rounds of the search after the first, and the nats that one must gain for another to follow."""


KNOB_RULES = {
    **dict.fromkeys(("gpu_factor", "far_factor", "price"), "finite and > 0"),
    **dict.fromkeys(("hysteresis", "migration_cap", "min_gain"), "finite and >= 0"),
    "moves": "0 or 1",
}
"""What the constants of `Knobs` may be."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Constants of the planner; the defaults are set by hand, tune them on the train split.

    Attributes:
        gpu_factor: expected GPU expert seconds are multiplied by it (kappa of H4).
        far_factor: the same for the far device.
        price: value of a second, relative to the reward's own 1 / T.
        hysteresis: share of a promotion's link time that is charged to the window it happens in.
        migration_cap: windows within which all promotions of a plan should have arrived.
        min_gain: least predicted gain (nats of log time) for which a placement is changed at all.
        moves: 1: in windows for which it is predicted to be better, the busiest experts of a step
            are copied to the GPU (service ``balance``); 0: never.

    Raises:
        ValueError: a constant is not in its range (`KNOB_RULES`).
    """

    gpu_factor: float = 1.0
    far_factor: float = 1.0
    price: float = 1.0
    hysteresis: float = 0.05
    migration_cap: float = 1.0
    min_gain: float = 0.002
    moves: float = 1.0

    def __post_init__(self) -> None:
        """Check every constant."""
        check_numbers(self, KNOB_RULES)


def constants_of(constants: Mapping[str, float]) -> tuple[Knobs, Blend]:
    """Planner and forecast with ``constants`` by name; the others keep their defaults.

    Raises:
        ValueError: a constant does not exist or is not in its range.
    """
    known = {f.name: kind for kind in (Knobs, Blend) for f in fields(kind)}
    unknown = sorted(constants.keys() - known.keys())
    if unknown:
        raise ValueError(f"balance has no constant {unknown}; it has {sorted(known)}")
    knobs = {name: value for name, value in constants.items() if known[name] is Knobs}
    blend = {name: value for name, value in constants.items() if known[name] is Blend}
    return Knobs(**knobs), Blend(**blend)


class Nudges(NamedTuple):
    """What layers want otherwise than the planner: factors, [L] each, 1 leaves it alone.

    Attributes:
        expected: routing as each layer expects it.
        far_factor: of the far device's seconds, when experts are chosen for HBM.
        price: of seconds against quality.
        hysteresis: of what a copy costs.
    """

    expected: Forecast
    far_factor: FloatArray
    price: FloatArray
    hysteresis: FloatArray


class Facts(NamedTuple):
    """What does not change within an episode; see `facts_of`.

    Attributes:
        table: nominal costs.
        loss: [L, NB, E] reward lost if all gate energy of a layer is served by that copy.
        guard: [L, NB, E] reward lost by serving the expert so, whatever its energy.
        requantise_s: [NB] seconds to make a copy; 0 where replicas are stored.
        far_computes: the far device computes.
        service: of plans that move nothing; ``None`` is the system's default.
        window: decode steps between two plans.
    """

    table: CostTable
    loss: FloatArray
    guard: FloatArray
    requantise_s: FloatArray
    far_computes: bool
    service: Service | None
    window: int


class Copies(NamedTuple):
    """What there is before the plan; [L, E] bits, 0 = none.

    Attributes:
        planned: width in the last plan, wherever the expert is; all 0 before the first.
        present: copies in HBM now, which are free to keep and which the budget charges.
    """

    planned: IntArray
    present: IntArray


class Guess(NamedTuple):
    """Where the search of the prices starts.

    Attributes:
        step_s: seconds of a decode step.
        byte_price: of HBM, in the objective.
        far_share: [L] the far device's share in a layer's critical time.
    """

    step_s: float
    byte_price: float
    far_share: FloatArray


Guesses = tuple[Guess, ...]
"""Without moves, and with them where they were considered; empty before a first plan."""


def facts_of(
    model: MoESpec, system: SystemSpec, quality: QualityModel, quality_weight: float, window: int
) -> Facts:
    """The planner's constants for ``model`` on the nominal ``system``."""
    table, kind = cost_table(model, system), system.default_service.kind
    errors = np.asarray(rel_mse_table(model, system, quality), dtype=np.float64).swapaxes(1, 2)
    loss = quality_weight * quality.kappa * layer_weights(model)[:, None, None] * errors
    guard = np.zeros_like(loss)
    for layer, expert in model.super_experts:
        nats = SUPER_EXPERT_NATS / len(model.super_experts)
        guard[layer, table.bits <= 2, expert] = quality_weight * nats
    remake = [requantise_s(model, system, bits) for bits in system.stored_bits]
    return Facts(
        table=table,
        loss=np.ascontiguousarray(loss),
        guard=np.ascontiguousarray(guard),
        requantise_s=np.array(remake),
        far_computes=kind != "fetch",
        service=Service(kind="in_place") if kind == "balance" else None,
        window=window,
    )


def balance(
    facts: Facts,
    expected: Forecast,
    copies: Copies,
    budget_bytes: float,
    knobs: Knobs,
    guesses: Guesses = (),
    nudges: Nudges | None = None,
) -> tuple[Plan, Guesses]:
    """The plan that balances GPU and far device in every layer within ``budget_bytes``.

    It never exceeds the budget as ``transition`` charges it (a copy that changes width counts at
    the larger of the two). Copies present are free to keep, others pay ``knobs.hysteresis``; what
    the link could not bring within ``knobs.migration_cap`` windows waits. The first plan of an
    episode loads in the foreground and pays nothing.

    Args:
        facts: from `facts_of`.
        expected: routing of the coming window.
        copies: what the last plan left.
        budget_bytes: HBM for experts.
        knobs: constants.
        guesses: from the last plan, where little has changed since: halves the work.
        nudges: each layer chooses once more by these, within the HBM bytes that the planner gave
            it, so that no layer takes from another.

    Returns:
        The plan, and the guesses for the next one.
    """
    window, outside_s = _window(facts, expected, copies), _outside_s(facts.table, expected)
    still = _Task(facts, copies, budget_bytes, knobs, window, outside_s)
    tasks = [still]
    if knobs.moves and facts.far_computes:
        tasks.append(still._replace(window=window._replace(moves=True)))
    answers = [_best(task, guesses[i : i + 1]) for i, task in enumerate(tasks)]
    moves = int(np.argmin([answer.objective for answer in answers]))
    task, best = tasks[moves], _refined(tasks[moves], answers[moves])
    answers[moves] = best
    plan = _plan_of(task, best if nudges is None else _nudged(task, best, nudges))
    return plan, tuple(answer.guess for answer in answers)


class _Task(NamedTuple):
    """What `balance` was given, and what does not depend on prices.

    Attributes:
        window: what is expected, less the price of making copies.
        outside_s: seconds of one step outside the routed experts.
    """

    facts: Facts
    copies: Copies
    budget_bytes: float
    knobs: Knobs
    window: Window
    outside_s: float

    @property
    def has_plan(self) -> bool:
        """Whether this is not the first plan."""
        return bool(self.copies.planned.any())

    def priced(self, window: Window, second: float) -> Window:
        """``window`` with the seconds of making copies; none where replicas are stored."""
        remake_s = self.facts.requantise_s / self.facts.window
        if not (self.has_plan and remake_s.any()):
            return window
        is_new = self.copies.planned[:, None, :] != self.facts.table.bits[:, None]
        return window._replace(lost=window.lost + second * remake_s[:, None] * is_new)


class _Answer(NamedTuple):
    """One round of the search and what it found."""

    objective: float
    prices: Prices
    options: Fillings
    chosen: IntArray
    far_index: IntArray
    guess: Guess


def _best(task: _Task, guesses: Guesses) -> _Answer:
    """What the guess leads to; without one, the best of two resorts."""
    if guesses:
        return _search(task, guesses[0])
    # log T is concave in T: a first and a last resort each have a valley of their own.
    answers = []
    for start in _first_guesses(task):
        rough = _search(task, start)
        answers += [rough, _search(task, rough.guess)]
    return min(answers, key=lambda answer: answer.objective)


def _refined(task: _Task, answer: _Answer) -> _Answer:
    """Search on from where ``answer`` got, while that is worth it."""
    for _ in range(N_MORE):
        again = _search(task, answer.guess)
        if again.objective > answer.objective - ENOUGH:
            return min(again, answer, key=lambda a: a.objective)
        answer = again
    return answer


def _search(task: _Task, guess: Guess) -> _Answer:
    """The best fillings while a second costs ``1 / guess.step_s``, and their true objective."""
    knobs = task.knobs
    second = knobs.price / guess.step_s
    hysteresis = knobs.hysteresis / task.facts.window * task.has_plan
    prices = Prices(
        second=second,
        byte=guess.byte_price,
        copy_second=second * hysteresis,
        far_share=guess.far_share,
        gpu_factor=knobs.gpu_factor,
        far_factor=knobs.far_factor,
    )
    options = fillings(task.priced(task.window, second), prices)
    chosen, byte_price = within_budget(options, task.budget_bytes)
    layers_s = float(at(options.seconds, chosen).sum())
    step_s = task.outside_s + layers_s
    far_share, far_index = far_widths(options, chosen)
    rest = float(at(options.objective, chosen).sum()) - second * layers_s
    return _Answer(
        objective=knobs.price * float(np.log(step_s)) + rest,
        prices=prices,
        options=options,
        chosen=chosen,
        far_index=far_index,
        guess=Guess(step_s, byte_price, far_share),
    )


def _nudged(task: _Task, answer: _Answer, nudges: Nudges) -> _Answer:
    """The fillings that layers choose for themselves."""
    found = answer.prices
    prices = found._replace(
        second=found.second * nudges.price,
        copy_second=found.copy_second * nudges.price * nudges.hysteresis,
        far_factor=found.far_factor * nudges.far_factor,
    )
    window = _window(task.facts, nudges.expected, task.copies, task.window.moves)
    options = fillings(task.priced(window, float(np.mean(found.second))), prices)
    rations = at(answer.options.n_bytes, answer.chosen)
    chosen = within_rations(options, rations, task.budget_bytes)
    _, far_index = far_widths(options, chosen)
    return answer._replace(prices=prices, options=options, chosen=chosen, far_index=far_index)


def _plan_of(task: _Task, best: _Answer) -> Plan:
    """The fillings chosen as a plan, less what is not worth its copies or could not arrive."""
    table, knobs, present = task.facts.table, task.knobs, task.copies.present
    options, far_index = best.options, best.far_index
    chosen = keep_or_change(options, best.chosen, present, task.budget_bytes, knobs.min_gain)
    if chosen is not best.chosen:
        _, far_index = far_widths(options, chosen)
    target = target_of(table, options, chosen)
    if task.has_plan:
        window_s = task.facts.window * best.guess.step_s
        can_arrive = knobs.migration_cap * window_s * table.link_bytes_per_s
        target = stage(table, target, present, task.budget_bytes, can_arrive)
    is_near = target.bits > 0
    placement = Placement(
        tier=np.where(is_near, np.uint8(HBM), np.uint8(FAR)),
        bitwidth=np.where(is_near, target.bits, table.bits[far_index]).astype(np.uint8),
    )
    service = MOVING if task.window.moves else task.facts.service
    return Plan(placement=placement, migration_order=target.value, service=service)


def hot_plan(
    score: ArrayLike,
    model: MoESpec,
    system: SystemSpec,
    budget_bytes: float,
    *,
    bits: int = 4,
    far_bits: int = 4,
    per_layer: bool = False,
) -> Plan:
    """The experts of highest ``score`` [L, E] in HBM at ``bits``, the others far at ``far_bits``.

    As many as the budget holds: over all layers, or equally many in each. The nearest stored
    widths are used; ties go to the lower layer and expert.
    """
    values = np.asarray(score, dtype=np.float64)
    near, far = nearest_width(system, bits), nearest_width(system, far_bits)
    n_hot = int(budget_bytes // expert_bytes(model, system.format, near))
    if per_layer:
        rank = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)
        hot = rank < n_hot // len(values)
    else:
        hot = np.zeros(values.size, dtype=np.bool_)
        hot[np.argsort(-values, axis=None, kind="stable")[:n_hot]] = True
        hot = hot.reshape(values.shape)
    placement = Placement(tier=np.where(hot, HBM, FAR), bitwidth=np.where(hot, near, far))
    return Plan(placement=placement, migration_order=values)


def _window(facts: Facts, expected: Forecast, copies: Copies, moves: bool = False) -> Window:
    """What is expected of the coming window, less the price of making copies."""
    lost = lost_at(expected, facts.loss, facts.guard)
    far_s = far_seconds(facts.table, facts.far_computes, expected)
    return Window(facts.table, facts.far_computes, expected, far_s, lost, copies.present, moves)


def _outside_s(table: CostTable, expected: Forecast) -> float:
    """Seconds of one step outside the routed experts."""
    slid = min(expected.context, expected.n_tokens * table.sliding_window)
    seen = np.where(table.layer_slides, slid, expected.context)
    routed = float((table.layer_s + table.kv_token_s * seen).sum())
    dense = (table.n_dense_full + table.n_dense_sliding) * table.dense_layer_s
    dense_kv = table.n_dense_full * expected.context + table.n_dense_sliding * slid
    engine = table.engine_base_s + table.engine_token_s * expected.n_tokens
    return routed + dense + table.kv_token_s * dense_kv + table.head_s + engine


def _first_guesses(task: _Task) -> tuple[Guess, Guess]:
    """As if everything were far at the middle width, and as if everything were in HBM."""
    table, active = task.facts.table, task.window.expected.active
    middle, sides = len(table.bits) // 2, np.ones(len(active))
    far_s = float(task.window.far_s[:, middle].copy().sum())
    gpu_s = float(active.sum() * table.gpu_weight_s[middle])
    gpu_s += len(sides) * float(table.gpu_launch_s[middle])
    room = max(task.budget_bytes, 1.0)
    slow, fast = task.outside_s + far_s + 1e-12, task.outside_s + gpu_s + 1e-12
    return Guess(slow, far_s / slow / room, sides), Guess(fast, far_s / fast / room, sides)
