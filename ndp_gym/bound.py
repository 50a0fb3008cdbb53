"""A proved upper bound for the reward of a decode window; the proof is ``docs/bound.md``.

It is clairvoyant, counts the overlap of GPU and far device, and lets copies arrive for free; within
a window a pinned copy arrives once and stays, as in the simulator. No plan, state or service of the
kernel earns more, except services that prefetch, which hide copies behind other layers.

Time at a fixed price is bounded by Lagrangian relaxation (`_Prices.value`), its logarithm from such
bounds at several prices (`_Prices.minimum`): whatever the multipliers are the result is a bound;
the search only makes it tight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable, cost_table
from ndp_gym.plan import all_far
from ndp_gym.quality import SUPER_EXPERT_NATS, QualityModel, layer_weights, rel_mse_table
from ndp_gym.simulate import initial_state, transition
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.state import Window

__all__ = ["Effort", "WindowBound", "window_bound"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

KINDS = ("in_place", "balance", "fetch")
NEVER_S = 1e12  # a far device that cannot compute
SLACK = 1e-9  # of the kernel's own rounding, in nats


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard the multipliers are searched; none of it matters for validity.

    Attributes:
        steps: subgradient steps at the first price of time; further prices start from there.
        more_steps: subgradient steps at each further price.
        resolution: prices of time are not told apart below this log ratio.
        max_prices: prices of time at most.
    """

    steps: int = 80
    more_steps: int = 25
    resolution: float = 0.02
    max_prices: int = 16


class WindowBound(NamedTuple):
    """The bound of one window.

    Attributes:
        reward: no plan earns more.
        kind: the service that attains the bound.
        pinned: [L, E] HBM widths of the relaxed optimum, 0 = none; a start for a search.
    """

    reward: float
    kind: str
    pinned: NDArray[np.uint8]


class _Facts(NamedTuple):
    """One window at the costs of one system; pairs are sorted by expert, then step."""

    outside_s: float  # attention, dense layers, head, engine: the same for all plans
    table: CostTable
    seconds: FloatArray  # [P, 3 NB]
    loss: FloatArray  # [P, NB] reward lost
    cell: IntArray  # [P] step * L + layer
    step: IntArray  # [P]
    starts: IntArray  # [X + 1]
    codes: IntArray  # [X] layer * E + expert
    n_steps: int
    n_cells: int
    reference_s: float
    reference: float  # log T + lambda D of the reference


def window_bound(
    window: Window,
    model: MoESpec,
    system: SystemSpec,
    *,
    budget_bytes: int,
    quality: QualityModel | None = None,
    quality_weight: float = 4.0,
    kinds: tuple[str, ...] = KINDS,
    effort: Effort | None = None,
) -> WindowBound:
    """No plan, from no state, earns more than this in ``window`` with a service of ``kinds``.

    ``in_place`` and ``balance`` are left out where the far device cannot compute. The bound does
    not hold for services with `Prefetch`.

    Args:
        window: the recorded routing.
        model: the model.
        system: the *actual* system.
        budget_bytes: of HBM.
        quality: error model; the default one if ``None``.
        quality_weight: reward lost per nat.
        kinds: services to bound.
        effort: of the search.

    Raises:
        ValueError: nothing is decoded in the window.
    """
    if not window.n_rows.any():
        raise ValueError("a bound needs at least one token in the window")
    facts = _facts(window, model, system, quality or QualityModel(), quality_weight)
    if not system.far.can_compute:
        kinds = ("fetch",)
    elif "balance" in kinds:  # moving nothing is one of its choices
        kinds = tuple(kind for kind in kinds if kind != "in_place")
    best: WindowBound | None = None
    for kind in kinds:
        search = _Prices(facts, kind, float(budget_bytes), effort or Effort())
        enough = np.inf if best is None else facts.reference - best.reward
        reward = facts.reference - search.minimum(enough) + SLACK
        if best is None or reward > best.reward:
            pinned = np.zeros((model.n_layers, model.n_experts), np.uint8)
            pinned.reshape(-1)[facts.codes] = search.pinned_bits()
            best = WindowBound(reward, kind, pinned)
    assert best is not None, "kinds is not empty"
    return best


class _Prices:
    """Multipliers of one window and one kind of service, and the bound they give.

    Attributes:
        theta: [C] share of a cell's critical time that the GPU's side has.
        psi: [C] share of the far side that the far device's floor has.
        launch_share: [P, NB] share of a launch that a pair on the GPU bears.
        far_share: [P] the same for what using the far device at all costs.
    """

    def __init__(self, facts: _Facts, kind: str, budget: float, effort: Effort) -> None:
        self.facts, self.kind, self.budget, self.effort = facts, KINDS.index(kind), budget, effort
        in_cell = np.bincount(facts.cell, minlength=facts.n_cells)[facts.cell].astype(np.float64)
        n_widths = facts.table.bits.size
        self.theta = np.full(facts.n_cells, 0.5)
        self.psi = np.full(facts.n_cells, 0.5 if facts.table.far_floor_s > 0 else 0.0)
        self.far_share = 1.0 / in_cell
        self.launch_share = np.repeat(self.far_share[:, None], n_widths, axis=1)
        self.byte_price = 0.0
        self._levels = np.zeros(facts.codes.size, np.int64)
        self._ways = np.zeros(facts.cell.size, np.int64)
        self._started = False

    def minimum(self, enough: float) -> float:
        """A lower bound of log T + lambda D over all plans; may stop once above ``enough``.

        Every V(u) <= u T + lambda D bounds lambda D from below by V(u) - u T. The logarithm plus
        the largest of these lines is concave between the points where lines cross, so that its
        least value stands at one of them.
        """
        facts = self.facts
        prices = [share / facts.reference_s for share in _FIRST_PRICES]
        values = [self.value(u) for u in prices]
        while True:
            lowest, price = _least(prices, values, facts.outside_s)
            is_new = min(abs(np.log(price / u)) for u in prices) > self.effort.resolution
            if not is_new or lowest > enough or len(prices) >= self.effort.max_prices:
                return lowest
            prices.append(price)
            values.append(self.value(price))

    def value(self, u: float) -> float:
        """A lower bound of min over plans of u T + lambda D, the best of all steps."""
        effort = self.effort
        n_steps = effort.more_steps if self._started else effort.steps
        best, kept = -np.inf, None
        for step in range(n_steps):
            found = self._evaluate(u)
            if found > best:
                best, kept = found, self._copy()
            age = step + (effort.steps // 2 if self._started else 0)
            self._improve(1.0 / (1.0 + 0.1 * age))
        if kept is not None:
            self.theta, self.psi, self.launch_share, self.far_share = kept
        self._started = True
        return best

    def pinned_bits(self) -> NDArray[np.uint8]:
        """[X] HBM width of every active expert at the last prices, 0 outside."""
        bits = np.concatenate([[0], self.facts.table.bits])
        return bits[self._levels].astype(np.uint8)

    def _copy(self) -> tuple[FloatArray, ...]:
        return tuple(a.copy() for a in (self.theta, self.psi, self.launch_share, self.far_share))

    def _evaluate(self, u: float) -> float:
        """The Lagrangian's minimum at the present multipliers and the best byte price."""
        from ndp_gym import bound_loops as loops

        facts, table = self.facts, self.facts.table
        omega = table.overlap
        near = u * (omega * self.theta + 1.0 - omega)
        far = u * (omega * (1.0 - self.theta) + 1.0 - omega)
        fixed_s = (1.0 - self.psi) * 2.0 * table.link_latency_s + self.psi * table.far_floor_s
        costs = loops.price_pairs(
            facts.seconds, facts.loss, facts.cell, near, far * (1.0 - self.psi),
            self.launch_share, self.far_share, far * fixed_s, table.gpu_launch_s,
        )  # fmt: skip
        waiting, way = loops.waiting_costs(costs, self.kind)
        levels = loops.level_costs(costs, waiting, way, facts.starts)
        sizes = table.weight_bytes.astype(np.float64)
        best = self._best_byte_price(levels, costs, sizes)
        loops.fill_ways(
            self._levels, costs, waiting, way, facts.step, facts.starts, self.kind,
            self.byte_price * sizes / facts.n_steps, self._ways,
        )  # fmt: skip
        return u * facts.outside_s + best

    def _best_byte_price(self, levels: FloatArray, costs: FloatArray, sizes: FloatArray) -> float:
        """The largest value over prices per HBM byte, by bisection of its slope."""
        from ndp_gym import bound_loops as loops

        facts, best, best_price = self.facts, -np.inf, 0.0

        def at(price: float) -> float:
            nonlocal best, best_price
            cost, used = loops.choose(
                levels, sizes, price, costs, facts.step, facts.starts, self.kind, facts.n_steps,
                self._levels,
            )  # fmt: skip
            value = float(cost - price * self.budget)
            if value > best:
                best, best_price = value, price
            return float(used - self.budget)

        if at(0.0) > 0.0:
            high = max(self.byte_price, 1e-3 / self.budget) if self.budget else 1.0
            low = 0.0
            while at(high) > 0.0:
                low, high = high, 4.0 * high
            for _ in range(24 if not self._started else 16):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if at(middle) > 0.0 else (low, middle)
        at(best_price)  # leaves its levels
        self.byte_price = best_price
        return best

    def _improve(self, rate: float) -> None:
        """One subgradient step: price the slower side, and who uses a launch."""
        from ndp_gym import bound_loops as loops

        facts, table = self.facts, self.facts.table
        near, far, borne, on_gpu, on_far = loops.use_of(
            self._ways, facts.seconds, facts.cell, self.launch_share, self.far_share,
            table.gpu_launch_s, facts.n_cells,
        )  # fmt: skip
        far_s = far + borne * 2.0 * table.link_latency_s
        floor_s = borne * table.far_floor_s
        if table.far_floor_s > 0:
            psi = self.psi + 0.3 * rate * (floor_s - far_s) / (floor_s + far_s + 1e-15)
            self.psi = np.clip(psi, 0.0, 1.0)
        far_s = (1.0 - self.psi) * far_s + self.psi * floor_s
        theta = self.theta + 0.3 * rate * (near - far_s) / (near + far_s + 1e-15)
        self.theta = np.clip(theta, 0.0, 1.0)
        loops.move_shares(
            self._ways, facts.cell, 0.5 * rate, on_gpu, on_far, self.launch_share, self.far_share
        )


_FIRST_PRICES = (1.0, 2.0, 4.0, 12.0, 300.0)  # of a second, times that of the reference's log


def _least(prices: list[float], values: list[float], fastest_s: float) -> tuple[float, float]:
    """Least log T + max over i of (values_i - prices_i T, 0) for T >= fastest, and a price there.

    The price lies between those of the two lines that cross there: the next one to try.
    """
    u, v = np.array([0.0, *prices]), np.array([0.0, *values])
    order = np.argsort(u)
    u, v = u[order], v[order]
    i, j = np.triu_indices(u.size, 1)
    crossings = (v[j] - v[i]) / (u[j] - u[i])
    seconds = np.append(crossings[crossings > fastest_s], fastest_s)
    lines = v - seconds[:, None] * u
    objective = np.log(seconds) + lines.max(axis=1)
    at = int(np.argmin(objective))
    near = np.flatnonzero(lines[at] >= lines[at].max() - 1e-9)
    low, high = u[near[0]], u[near[-1]]
    price = float(np.sqrt(low * high)) if low > 0 else 1.0 / float(seconds[at])
    return float(objective[at]), price


def _facts(
    window: Window, model: MoESpec, system: SystemSpec, quality: QualityModel, weight: float
) -> _Facts:
    """Pairs, their seconds and their loss, and what no plan changes."""
    table = cost_table(model, system)
    tokens, energy = _counts(window, model)
    total, in_layer = tokens.sum(axis=0), energy.sum(axis=0).reshape(model.n_layers, -1).sum(axis=1)
    expert, step = np.nonzero(tokens.T)
    m, q, layer = tokens[step, expert], energy[step, expert], expert // model.n_experts
    errors = np.asarray(rel_mse_table(model, system, quality), np.float64)
    errors = errors.reshape(-1, errors.shape[-1])
    share = q * quality.kappa * layer_weights(model)[layer] / in_layer[layer]
    loss = share[:, None] * errors[expert]
    supers = {layer * model.n_experts + e for layer, e in model.super_experts}
    if supers:
        nats = np.isin(expert, list(supers)) * SUPER_EXPERT_NATS / len(supers) * m / total[expert]
        loss += nats[:, None] * (table.bits <= 2)
    token_s = np.where(np.isfinite(table.far_token_s), table.far_token_s, NEVER_S)
    rows = np.maximum(m, table.far_min_tokens)[:, None] * token_s
    crossing = m[:, None] / model.top_k * table.activation_token_s
    far_s = np.maximum(table.far_weight_s, rows) + crossing
    gpu_s = np.broadcast_to(table.gpu_weight_s, far_s.shape)
    codes, first = np.unique(expert, return_index=True)
    outside_s, reference_s, ref_nats = _outside_and_reference(window, model, system, quality)
    return _Facts(
        outside_s=outside_s,
        table=table,
        seconds=np.concatenate([gpu_s, far_s, gpu_s + table.copy_s], axis=1),
        loss=weight * loss,
        cell=step * model.n_layers + layer,
        step=step,
        starts=np.append(first, expert.size),
        codes=codes,
        n_steps=int(window.n_rows.max()),
        n_cells=len(tokens) * model.n_layers,
        reference_s=reference_s,
        reference=float(np.log(reference_s)) + weight * ref_nats,
    )


def _counts(window: Window, model: MoESpec) -> tuple[IntArray, FloatArray]:
    """[W, L * E] tokens and squared-gate energy of every expert in every step."""
    shape = (window.length, model.n_layers * model.n_experts)
    tokens, energy = np.zeros(shape, np.int64), np.zeros(shape)
    base = (np.arange(model.n_layers) * model.n_experts)[:, None]
    profile = window.gate_profile
    gates = np.full(model.top_k, 1.0 / model.top_k) if profile is None else np.asarray(profile)
    for first, n in zip(window.first_row.tolist(), window.n_rows.tolist(), strict=True):
        rows = slice(first, first + n)
        codes = np.asarray(window.expert_ids[rows]).astype(np.int64) + base
        if window.gate_weights is not None:
            gates = np.asarray(window.gate_weights[rows]).astype(np.float64)
        steps = np.broadcast_to(np.arange(n)[:, None, None], codes.shape)
        np.add.at(tokens, (steps, codes), 1)
        np.add.at(energy, (steps, codes), np.broadcast_to(gates * gates, codes.shape))
    return tokens, energy


def _outside_and_reference(
    window: Window, model: MoESpec, system: SystemSpec, quality: QualityModel
) -> tuple[float, float, float]:
    """Seconds outside the experts, which no plan changes; the reference's seconds and nats."""
    everything = np.iinfo(np.int64).max
    _, outcome = transition(
        initial_state(model, system), all_far(model, system), window, model, system,
        budget_bytes=everything, quality=quality,
    )  # fmt: skip
    experts_s = outcome.gpu_s.sum() + outcome.stall_s.sum()
    outside_s = float(outcome.step_s.sum() - experts_s)
    return outside_s, float(outcome.ref_decode_s), float(outcome.ref_delta_nll)
