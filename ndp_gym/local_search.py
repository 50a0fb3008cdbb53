"""A clairvoyant local search for the plan of one window: how good can a plan that is found be?

It sees the routing, starts with every copy in place and moves one expert (or swaps two) at a time
in every layer, at a price per HBM byte that bisection sets. What it reaches is achieved, not a
bound; `ndp_gym.bound` is one, and the two together say how loose that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.batch import Simulator
from ndp_gym.cost import cost_table
from ndp_gym.outcome import Outcome
from ndp_gym.packing import stack_windows
from ndp_gym.plan import FAR, HBM, Placement, Plan, nearest_width
from ndp_gym.quality import SUPER_EXPERT_NATS, QualityModel, layer_weights
from ndp_gym.reward import reward, reward_terms
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.state import Window

__all__ = ["Found", "search"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


FIRST = (1.0, 3.0, 10.0)
"""Prices of a second to begin with, times that of the reference: log time has many valleys."""


class Found(NamedTuple):
    """The best plan met, and its reward when all of its copies are there from the start."""

    plan: Plan
    reward: float


def search(
    window: Window,
    model: MoESpec,
    system: SystemSpec,
    *,
    budget_bytes: int,
    starts: Sequence[Placement] = (),
    quality: QualityModel | None = None,
    quality_weight: float = 4.0,
    first: Sequence[float] = FIRST,
    n_rounds: int = 2,
    seed: int = 0,
    service: Service | None = None,
) -> Found:
    """A good plan for ``window``.

    Args:
        window: the recorded routing, which the search sees.
        model: the model.
        system: the actual system.
        budget_bytes: of HBM.
        starts: placements to start from, beside all far and all in HBM.
        quality: error model; the default one if ``None``.
        quality_weight: reward lost per nat.
        first: prices of a second that are tried first, from all far and from all in HBM each;
            fewer save time where ``starts`` are good.
        n_rounds: how often the price of a second is set anew after those.
        seed: of the order of moves.
        service: of the plan; the system's default if ``None``.
    """
    climb = _Climb(
        window, model, system, quality or QualityModel(), quality_weight, seed,
        service or system.default_service,
    )  # fmt: skip
    widths = system.stored_bits
    far4 = len(widths) + widths.index(nearest_width(system, 4))
    ends = [np.full((model.n_layers, model.n_experts), c) for c in (far4, len(widths) - 1)]
    best, (best_value, outcome) = ends[0], climb.evaluate(ends[0])
    reference_s = float(outcome.decode_s)
    for start in (climb.choice_of(placement) for placement in starts):
        value, found = climb.evaluate(start)
        if value > best_value and climb.bytes_of(start) <= budget_bytes:
            best, best_value, outcome = start, value, found
    firsts = [(choice, factor / reference_s) for choice in ends for factor in first]
    for turn in range(len(firsts) + n_rounds):
        later = best, 1.0 / float(outcome.decode_s)
        choice, climb.second_price = firsts[turn] if turn < len(firsts) else later
        low, price = 0.0, 0.1 / max(budget_bytes, 1)
        high = price
        while climb.bytes_of(choice := climb.descend(choice, high)) > budget_bytes:
            low = high
            price = high = 4.0 * high
        for _ in range(8):
            value, _ = climb.evaluate(choice)
            fits = climb.bytes_of(choice) <= budget_bytes
            if fits and value > best_value:
                best, best_value = choice.copy(), value
            low, high = (low, price) if fits else (price, high)
            price = 0.5 * (low + high)
            choice = climb.descend(choice, price)
        _, outcome = climb.evaluate(best)
    return Found(climb.plan_of(best), best_value)


class _Climb:
    """Descent of one window's Lagrangian. A choice [L, E] is an entry of the menu: tier and width.

    Layers only meet in the budget and in the logarithm of time, so that one lane tries a move in
    every layer at once.
    """

    def __init__(
        self,
        window: Window,
        model: MoESpec,
        system: SystemSpec,
        quality: QualityModel,
        weight: float,
        seed: int,
        service: Service,
    ) -> None:
        self.window, self.model, self.system = window, model, system
        self.quality, self.weight, self.second_price = quality, weight, 0.0
        self.rng, self.service = np.random.default_rng(seed), service
        bits = np.array(system.stored_bits, np.uint8)
        self.bits = np.tile(bits, 2)
        self.tier = np.repeat(np.array([HBM, FAR], np.uint8), bits.size)
        self.sizes = cost_table(model, system).weight_bytes * 1.0
        self.sizes = np.concatenate([self.sizes, np.zeros(bits.size)])

    def choice_of(self, placement: Placement) -> IntArray:
        index = {bits: i for i, bits in enumerate(self.system.stored_bits)}
        width: IntArray = np.zeros(placement.tier.shape, np.int64)
        for bits, i in index.items():
            width[placement.bitwidth == bits] = i
        width[placement.tier == FAR] += len(index)
        return width

    def plan_of(self, choice: IntArray) -> Plan:
        placement = Placement(tier=self.tier[choice], bitwidth=self.bits[choice])
        return Plan(placement=placement, service=self.service)

    def bytes_of(self, choice: IntArray) -> float:
        return float(self.sizes[choice].sum())

    def evaluate(self, choice: IntArray) -> tuple[float, Outcome]:
        outcome = self._replay(choice[None]).lane(0)
        return float(reward(reward_terms(outcome), self.weight)), outcome

    def descend(self, choice: IntArray, byte_price: float) -> IntArray:
        """Move, then swap, until two sweeps have passed or nothing improves."""
        choice = choice.copy()
        n_experts = self.model.n_experts
        for _ in range(2):
            before = choice.copy()
            for expert in self.rng.permutation(n_experts):
                tried = np.repeat(choice[None], self.bits.size, axis=0)
                tried[:, :, expert] = np.arange(self.bits.size)[:, None]
                best = self._costs(tried, byte_price).argmin(axis=0)
                choice[:, expert] = best
            for _ in range(min(n_experts * (n_experts - 1) // 2, 40)):
                one, other = self.rng.choice(n_experts, 2, replace=False)
                swapped = choice.copy()
                swapped[:, [one, other]] = choice[:, [other, one]]
                costs = self._costs(np.stack([choice, swapped]), byte_price)
                choice = np.where((costs[1] < costs[0] - 1e-12)[:, None], swapped, choice)
            if np.array_equal(before, choice):
                break
        return choice

    def _costs(self, choices: IntArray, byte_price: float) -> FloatArray:
        """[N, L] seconds, loss and bytes of every layer at their prices."""
        outcome = self._replay(choices)
        shares = outcome.layer_error / np.maximum(outcome.layer_energy, 1e-300)
        nats = self.quality.kappa * layer_weights(self.model) * shares
        for layer, expert in self.model.super_experts:
            is_low = (self.bits[choices[:, layer, expert]] <= 2) & (
                outcome.counts[:, layer, expert] > 0
            )
            nats[:, layer] += is_low * SUPER_EXPERT_NATS / len(self.model.super_experts)
        bytes_ = self.sizes[choices].sum(axis=2)
        costs: FloatArray = self.second_price * outcome.layer_s + self.weight * nats
        costs += byte_price * bytes_
        return costs

    def _replay(self, choices: IntArray) -> Outcome:
        """[N] fresh lanes, whose copies are there at once."""
        n = len(choices)
        lanes = Simulator(self.model, self.system, self.quality, n_lanes=n)
        return lanes.advance(
            tier=self.tier[choices],
            bits=self.bits[choices],
            order=np.zeros(choices.shape),
            services=(self.service,) * n,
            windows=stack_windows([self.window] * n),
            length=self.window.length,
            budgets=np.full(n, np.iinfo(np.int64).max),
        )
