"""`transition`: the one place where time passes.

A state, a plan and a window of recorded routing go in; the next state and what the window cost
come out.

A pure view of one lane of `Simulator`, which advances many at once through the same compiled
kernel. Nothing here knows Gymnasium, rewards or policies.
"""

from __future__ import annotations

import numpy as np

from ndp_gym.batch import Simulator
from ndp_gym.outcome import Outcome
from ndp_gym.packing import stack_windows
from ndp_gym.plan import Plan, check_plan
from ndp_gym.quality import QualityModel
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.state import State, Window

__all__ = ["Outcome", "State", "Window", "initial_state", "transition"]


def transition(
    state: State,
    plan: Plan,
    window: Window,
    model: MoESpec,
    system: SystemSpec,
    *,
    budget_bytes: int,
    quality: QualityModel | None = None,
) -> tuple[State, Outcome]:
    """Replay ``window`` under ``plan``, starting from ``state``, which is left as it was.

    Args:
        state: from `initial_state` or the transition before.
        plan: repaired (and counted in ``n_repaired``) where it exceeds ``budget_bytes``.
        window: ids are trusted here; `RoutingTrace` validates what it hands out.
        model: must agree with the window in routed layers and top-k.
        system: the *actual* system; policies may have been told another.
        budget_bytes: HBM for expert weights.
        quality: error model; the default one if ``None``.

    Raises:
        ValueError: the plan does not fit the model, the stored widths or the far device.
    """
    check_plan(plan, model, system)
    order = state.load if plan.migration_order is None else plan.migration_order
    lanes = Simulator(model, system, quality or QualityModel(), n_lanes=1)
    lanes.put_state(0, state)
    outcome = lanes.advance(
        tier=plan.placement.tier[None],
        bits=plan.placement.bitwidth[None],
        order=order[None],
        services=(plan.service or system.default_service,),
        windows=stack_windows([window]),
        length=window.length,
        budgets=np.array([budget_bytes], dtype=np.int64),
    )
    return lanes.get_state(0, load=outcome.counts[0].astype(np.float64)), outcome.lane(0)


def initial_state(model: MoESpec, system: SystemSpec) -> State:
    """An empty HBM before the first plan."""
    return Simulator(model, system, QualityModel(), n_lanes=1).get_state(0)
