"""The exact optimum of one window for tiny instances: every plan is tried.

The ground truth that planners and bounds are tested against, as the exact schedules of OptPipe are
for its heuristics. It calls the simulator, so that it is exact for the model of time, not of it.
"""

from __future__ import annotations

from itertools import islice, product
from typing import NamedTuple

import numpy as np

from ndp_gym.batch import Simulator
from ndp_gym.packing import stack_windows
from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.quality import QualityModel
from ndp_gym.reward import reward, reward_terms
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.state import State, Window

__all__ = ["MAX_PLANS", "Optimum", "best_plan"]

MAX_PLANS = 2_000_000
_PER_CALL = 4096  # lanes


class Optimum(NamedTuple):
    """The plan of highest reward and how many were compared."""

    plan: Plan
    reward: float
    n_plans: int


def best_plan(
    window: Window,
    model: MoESpec,
    system: SystemSpec,
    *,
    budget_bytes: int,
    state: State | None = None,
    service: Service | None = None,
    quality: QualityModel | None = None,
    quality_weight: float = 4.0,
) -> Optimum:
    """The best of all placements of all experts, at ``service`` and the default migration order.

    Placements over the budget are left out, as repair makes each of them another one of the list.

    Args:
        window: the recorded routing, which the search sees.
        model: the model; ``(2 widths) ** experts`` plans must be at most `MAX_PLANS`.
        system: the actual system.
        budget_bytes: of HBM.
        state: where the window starts; ``None`` is an empty HBM, whose copies load at once.
        service: the system's default if ``None``.
        quality: error model; the default one if ``None``.
        quality_weight: reward lost per nat.

    Raises:
        ValueError: too many plans.
    """
    shape = (model.n_layers, model.n_experts)
    menu = [(tier, bits) for tier in (HBM, FAR) for bits in system.stored_bits]
    n_plans = len(menu) ** (shape[0] * shape[1])
    if n_plans > MAX_PLANS:
        raise ValueError(f"at most {MAX_PLANS} plans can be tried, got {n_plans}")
    service = service or system.default_service
    choices = product(menu, repeat=shape[0] * shape[1])
    best: Optimum | None = None
    while chunk := list(islice(choices, _PER_CALL)):
        plans = np.array(chunk, np.uint8).reshape(len(chunk), *shape, 2)
        lanes = Simulator(model, system, quality or QualityModel(), n_lanes=len(chunk))
        if state is not None:
            for lane in range(len(chunk)):
                lanes.put_state(lane, state)
        order = np.zeros(shape) if state is None else state.load
        outcome = lanes.advance(
            tier=plans[..., 0],
            bits=plans[..., 1],
            order=np.broadcast_to(order, (len(chunk), *shape)),
            services=(service,) * len(chunk),
            windows=stack_windows([window] * len(chunk)),
            length=window.length,
            budgets=np.full(len(chunk), budget_bytes, np.int64),
        )
        rewards = reward(reward_terms(outcome), quality_weight)
        rewards = np.where(outcome.n_repaired == 0, rewards, -np.inf)
        at = int(np.argmax(rewards))
        if best is None or rewards[at] > best.reward:
            placement = Placement(tier=plans[at, ..., 0], bitwidth=plans[at, ..., 1])
            plan = Plan(placement=placement, service=service)
            best = Optimum(plan, float(rewards[at]), n_plans)
    assert best is not None, "all far fits any budget"
    return best
