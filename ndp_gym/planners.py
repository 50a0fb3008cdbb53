"""The ``balance`` planner: which experts fill HBM, and at how many bits, as a function of loads.

Formulation H4 of ``learning.md``: in every layer HBM is filled only while the slower of GPU and far
device gets faster, and widths are bought where quality is cheapest in seconds. One price per HBM
byte, shared by all layers, enforces the budget. The planner sees expected loads and nominal costs;
it never replays routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.allocation import at, far_widths, keep_or_change, stage, target_of, within_budget
from ndp_gym.cost import CostTable, cost_table, expert_bytes, requantise_s
from ndp_gym.fillings import Prices, Window, far_seconds, fillings
from ndp_gym.forecast import Forecast
from ndp_gym.plan import FAR, HBM, Placement, Plan, nearest_width
from ndp_gym.quality import QualityModel, layer_weights, rel_mse_table
from ndp_gym.specs import MoESpec, SystemSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SUPER_EXPERT_NATS = 0.8
"""Loss where the super experts are served at <= 2 bits (``quantization.md`` section 0, guard)."""


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
    """

    gpu_factor: float = 1.0
    far_factor: float = 1.0
    price: float = 1.0
    hysteresis: float = 0.05
    migration_cap: float = 1.0
    min_gain: float = 0.002


class Facts(NamedTuple):
    """What does not change within an episode; see `facts_of`.

    Attributes:
        table: nominal costs.
        loss: [L, E, NB] reward lost if all gate energy of a layer is served by that copy.
        guard: [L, E, NB] reward lost by serving the expert so, whatever its energy.
        requantise_s: [NB] seconds to make a copy; 0 where replicas are stored.
        in_place: the far device computes.
        window: decode steps between two plans.
    """

    table: CostTable
    loss: FloatArray
    guard: FloatArray
    requantise_s: FloatArray
    in_place: bool
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


def facts_of(
    model: MoESpec, system: SystemSpec, quality: QualityModel, quality_weight: float, window: int
) -> Facts:
    """The planner's constants for ``model`` on the nominal ``system``."""
    table = cost_table(model, system)
    errors = np.asarray(rel_mse_table(model, system, quality), dtype=np.float64)
    loss = quality_weight * quality.kappa * layer_weights(model)[:, None, None] * errors
    guard = np.zeros_like(loss)
    for layer, expert in model.super_experts:
        nats = SUPER_EXPERT_NATS / len(model.super_experts)
        guard[layer, expert, table.bits <= 2] = quality_weight * nats
    remake = [requantise_s(model, system, bits) for bits in system.stored_bits]
    return Facts(
        table=table,
        loss=loss,
        guard=guard,
        requantise_s=np.array(remake),
        in_place=system.default_service.kind == "in_place",
        window=window,
    )


def balance(
    facts: Facts,
    expected: Forecast,
    copies: Copies,
    budget_bytes: float,
    knobs: Knobs,
    guess: Guess | None = None,
) -> tuple[Plan, Guess]:
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
        guess: from the last plan, where little has changed since: halves the work.

    Returns:
        The plan, and the guess for the next one.
    """
    table, started = facts.table, bool(copies.planned.any())
    outside_s = _outside_s(table, expected)
    n_rounds = 1 if guess else 2
    step_s, byte_price, far_share = guess or _first_guess(facts, expected, budget_bytes)
    for _ in range(n_rounds):
        second = knobs.price / step_s
        prices = Prices(
            second=second,
            byte=byte_price,
            copy_second=second * knobs.hysteresis * started / facts.window,
            far_share=far_share,
            gpu_factor=knobs.gpu_factor,
            far_factor=knobs.far_factor,
        )
        lost = facts.loss * expected.energy[..., None] + facts.guard
        lost += _remake(facts, copies, second)
        window = Window(table, facts.in_place, expected, lost, copies.present)
        options = fillings(window, prices)
        chosen, byte_price = within_budget(options, budget_bytes)
        step_s = outside_s + float(at(options.seconds, chosen).sum())
        far_share, far_index = far_widths(window, prices, options, chosen)
    chosen = keep_or_change(options, chosen, copies.present, budget_bytes, knobs.min_gain)
    _, far_index = far_widths(window, prices, options, chosen)
    target = target_of(table, options, chosen)
    if started:
        can_arrive = knobs.migration_cap * facts.window * step_s * table.link_bytes_per_s
        target = stage(table, target, copies.present, budget_bytes, can_arrive)
    bits = np.where(target.bits > 0, target.bits, table.bits[far_index]).astype(np.uint8)
    placement = Placement(tier=np.where(target.bits > 0, HBM, FAR), bitwidth=bits)
    plan = Plan(placement=placement, migration_order=target.value)
    return plan, Guess(step_s, byte_price, far_share)


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


def _remake(facts: Facts, copies: Copies, second: float) -> FloatArray:
    """[L, E, NB] price of requantising to a width that is not the planned one (0 with replicas)."""
    changes = (copies.planned[..., None] != facts.table.bits) & copies.planned.any()
    priced: FloatArray = changes * (second * facts.requantise_s / facts.window)
    return priced


def _outside_s(table: CostTable, expected: Forecast) -> float:
    """Seconds of one step outside the routed experts."""
    slid = min(expected.context, expected.n_tokens * table.sliding_window)
    seen = np.where(table.layer_slides, slid, expected.context)
    routed = float((table.layer_s + table.kv_token_s * seen).sum())
    dense = (table.n_dense_full + table.n_dense_sliding) * table.dense_layer_s
    dense_kv = table.n_dense_full * expected.context + table.n_dense_sliding * slid
    engine = table.engine_base_s + table.engine_token_s * expected.n_tokens
    return routed + dense + table.kv_token_s * dense_kv + table.head_s + engine


def _first_guess(facts: Facts, expected: Forecast, budget_bytes: float) -> Guess:
    """As if everything were far at the middle width, and HBM could save all of that."""
    far_s = far_seconds(facts.table, facts.in_place, expected)
    far_step_s = float(far_s[..., len(facts.table.bits) // 2].sum()) + 1e-12
    step_s = _outside_s(facts.table, expected) + far_step_s
    return Guess(step_s, far_step_s / step_s / max(budget_bytes, 1.0), np.ones(len(far_s)))
