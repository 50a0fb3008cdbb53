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

from ndp_gym.cost import CostTable, cost_table, expert_bytes, requantise_s
from ndp_gym.fillings import Fillings, Prices, far_seconds, fillings
from ndp_gym.forecast import Forecast
from ndp_gym.plan import FAR, HBM, Placement, Plan, nearest_width
from ndp_gym.quality import QualityModel, layer_weights, rel_mse_table
from ndp_gym.specs import MoESpec, SystemSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SUPER_EXPERT_NATS = 0.8
"""Loss where the super experts are served at <= 2 bits (``quantization.md`` section 0, guard)."""
_BISECTIONS = 20
_FILL_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Constants of the planner; the defaults are set by hand, tune them on the train split.

    Attributes:
        gpu_factor: expected GPU expert seconds are multiplied by it (kappa of H4).
        far_factor: the same for the far device.
        price: value of a second, relative to the reward's own 1 / T.
        hysteresis: share of a promotion's link time that is charged to the window it happens in.
        min_gain: least predicted gain (nats of log time) for which a placement is changed at all.
    """

    gpu_factor: float = 1.0
    far_factor: float = 1.0
    price: float = 1.0
    hysteresis: float = 0.15
    min_gain: float = 0.002


class Facts(NamedTuple):
    """What does not change within an episode; see `facts_of`."""

    table: CostTable
    loss: FloatArray
    requantise_s: FloatArray
    in_place: bool
    window: int


class Copies(NamedTuple):
    """What there is before the plan; [L, E] bits, 0 = none.

    Attributes:
        planned: width in the last plan, wherever the expert is; all 0 before the first.
        wanted: HBM copies of the last plan, in place or on their way.
        present: copies in HBM now, which the budget charges.
    """

    planned: IntArray
    wanted: IntArray
    present: IntArray


def facts_of(
    model: MoESpec, system: SystemSpec, quality: QualityModel, quality_weight: float, window: int
) -> Facts:
    """The planner's constants for ``model`` on the nominal ``system``.

    ``loss`` [L, E, NB] is the reward lost if all gate energy of a layer is served by that copy.
    """
    table = cost_table(model, system)
    errors = np.asarray(rel_mse_table(model, system, quality), dtype=np.float64)
    loss = quality_weight * quality.kappa * layer_weights(model)[:, None, None] * errors
    for layer, expert in model.super_experts:
        # The guard counts shares of the expert's own tokens: its energy share is about 1 / E.
        guard = quality_weight * SUPER_EXPERT_NATS / len(model.super_experts) * model.n_experts
        loss[layer, expert, table.bits <= 2] += guard
    remake = [requantise_s(model, system, bits) for bits in system.stored_bits]
    return Facts(
        table=table,
        loss=loss,
        requantise_s=np.array(remake),
        in_place=system.default_service.kind == "in_place",
        window=window,
    )


def balance(
    facts: Facts, expected: Forecast, copies: Copies, budget_bytes: float, knobs: Knobs
) -> Plan:
    """The plan that balances GPU and far device in every layer within ``budget_bytes``.

    It never exceeds the budget as ``transition`` charges it (a copy that changes width counts at
    the larger of the two). Keeping a wanted copy is free, every other one pays
    ``knobs.hysteresis``; the first plan of an episode loads in the foreground and pays nothing.

    Args:
        facts: from `facts_of`.
        expected: routing of the coming window.
        copies: what the last plan left.
        budget_bytes: HBM for experts.
        knobs: constants.
    """
    table = facts.table
    outside_s = _outside_s(table, expected)
    step_s = outside_s + _far_step_s(facts, expected)
    byte_price = (1 - outside_s / step_s) / max(budget_bytes, 1.0)
    n_layers = len(copies.wanted)
    far_share = np.ones(n_layers)
    widths = np.repeat(np.arange(len(table.bits))[:, None], n_layers, axis=1)
    for _ in range(2):
        second = knobs.price / step_s
        prices = Prices(
            second=second,
            byte=byte_price,
            copy_second=second * knobs.hysteresis / facts.window * copies.planned.any(),
            far_share=far_share,
            gpu_factor=knobs.gpu_factor,
            far_factor=knobs.far_factor,
        )
        lost = facts.loss * expected.energy[..., None] + _remake(facts, copies, second)
        options = fillings(
            table, facts.in_place, lost, expected, copies.wanted, copies.present, prices, widths
        )
        chosen, byte_price = _within_budget(options, budget_bytes)
        step_s = outside_s + float(_at(options.seconds, chosen).sum())
        far_share = _at(options.far_share, chosen)
        widths = _main_width(options, chosen)[None]
    chosen = _keep(options, chosen, copies.wanted, budget_bytes, knobs.min_gain)
    return _plan_of(table, options, chosen)


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


def _far_step_s(facts: Facts, expected: Forecast) -> float:
    """Seconds of all experts if everything is far at the middle width; only a first guess."""
    seconds = far_seconds(facts.table, facts.in_place, expected)
    return float(seconds[..., len(facts.table.bits) // 2].sum()) + 1e-12


def _within_budget(options: Fillings, budget_bytes: float) -> tuple[IntArray, float]:
    """The best filling per layer under the smallest byte price that keeps the budget.

    Returns:
        [L] flat indices into (C, E + 1), and the price.
    """
    n_layers = len(options.objective)
    objective = options.objective.reshape(n_layers, -1)
    n_bytes = options.n_bytes.reshape(n_layers, -1)

    def best(price: float) -> IntArray:
        index: IntArray = (objective + price * n_bytes).argmin(axis=1)
        return index

    chosen = best(0.0)
    if _at(n_bytes, chosen).sum() <= budget_bytes:
        return chosen, 0.0
    # Above the highest price nothing is worth its bytes.
    high = 2 * float(np.ptp(objective)) / float(n_bytes[n_bytes > 0].min())
    low = high * 1e-6
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if _at(n_bytes, best(middle)).sum() <= budget_bytes:
            high = middle
        else:
            low = middle
    return _fill_up(objective, n_bytes, best(high), budget_bytes), high


def _fill_up(
    objective: FloatArray, n_bytes: FloatArray, chosen: IntArray, budget_bytes: float
) -> IntArray:
    """Spend what the common price left over: the layer that gains most takes it, and again."""
    chosen = chosen.copy()
    for _ in range(_FILL_STEPS):
        used = _at(n_bytes, chosen)
        room = used + (budget_bytes - used.sum())
        reachable = np.where(n_bytes <= room[:, None], objective, np.inf)
        candidate = reachable.argmin(axis=1)
        gains = _at(objective, chosen) - _at(objective, candidate)
        layer = int(gains.argmax())
        if not gains[layer] > 0:
            break
        chosen[layer] = candidate[layer]
    return chosen


def _main_width(options: Fillings, chosen: IntArray) -> IntArray:
    """[L] the width index of the most valuable HBM copy of each layer."""
    ranking = chosen // options.objective.shape[-1]
    rows = np.arange(len(chosen))
    first = options.items.ranking[ranking, rows, 0]
    width: IntArray = options.items.hbm_index[ranking, rows, first]
    return width


def _keep(
    options: Fillings, chosen: IntArray, held: IntArray, budget_bytes: float, min_gain: float
) -> IntArray:
    """``chosen``, or exactly the copies held now where changing them does not gain ``min_gain``."""
    if not held.any():
        return chosen
    _, n_rankings, n_counts = options.objective.shape
    same = (n_rankings - 1) * n_counts + (held > 0).sum(axis=1)
    fits = _at(options.n_bytes, same).sum() <= budget_bytes
    gain = float((_at(options.objective, same) - _at(options.objective, chosen)).sum())
    return same if fits and gain < min_gain else chosen


def _plan_of(table: CostTable, options: Fillings, chosen: IntArray) -> Plan:
    """The chosen fillings as a plan; copies are ordered by the objective they save per byte."""
    items = options.items
    n_counts = options.objective.shape[-1]
    ranking, count = chosen // n_counts, chosen % n_counts
    rows = np.arange(len(chosen))
    rank = items.ranking[ranking, rows].argsort(axis=1)
    in_hbm = rank < count[:, None]
    index = np.where(in_hbm, items.hbm_index[ranking, rows], items.far_index)
    placement = Placement(
        tier=np.where(in_hbm, HBM, FAR).astype(np.uint8),
        bitwidth=table.bits[index].astype(np.uint8),
    )
    order = items.gain[ranking, rows] / items.n_bytes[ranking, rows]
    return Plan(placement=placement, migration_order=order)


def _at(values: FloatArray, chosen: IntArray) -> FloatArray:
    """Entries of ``values`` [L, ...] at one flat index per layer."""
    picked: FloatArray = values.reshape(len(chosen), -1)[np.arange(len(chosen)), chosen]
    return picked
