"""The bound of a window is above all that can be done, and the exhaustive search is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndp_gym.bound import Effort, window_bound
from ndp_gym.evaluation import evaluate
from ndp_gym.exhaustive import best_plan
from ndp_gym.local_search import search
from ndp_gym.plan import Plan
from ndp_gym.policy import Observation
from ndp_gym.quality import QualityModel
from ndp_gym.report import print_tables
from ndp_gym.results import EvaluationResult
from ndp_gym.reward import reward, reward_terms
from ndp_gym.simulate import State, Window, initial_state, transition
from ndp_gym.specs import MoESpec, Prefetch, Service, SystemSpec
from policies.lru import Lru
from tests.conftest import make_trace
from tests.random_cases import random_case, random_model, random_system, random_window
from tests.sample_results import sample_row
from tests.toy import MODEL, SYSTEM, TOKEN, window_of

QUICK = Effort(steps=15, more_steps=5, max_prices=6)
POOR = Effort(steps=1, more_steps=1, max_prices=3)


def earned(state: State, plan: Plan, window: Window, model: MoESpec, system: SystemSpec,
           budget: int, weight: float = 4.0) -> tuple[State, float]:  # fmt: skip
    state, outcome = transition(state, plan, window, model, system, budget_bytes=budget)
    return state, float(reward(reward_terms(outcome), weight))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_no_window_of_a_random_episode_earns_more(seed: int) -> None:
    """Whatever plan, state, service and system, and however poor the search of multipliers."""
    case = random_case(seed)
    state = initial_state(case.model, case.system)
    effort = QUICK if seed % 2 else POOR
    for window, plan, budget in zip(case.windows, case.plans, case.budgets, strict=True):
        if not window.n_rows.any():
            state, _ = transition(state, plan, window, case.model, case.system, budget_bytes=budget)
            continue
        if plan.service is not None and plan.service.prefetch is not None:
            plan = replace(plan, service=replace(plan.service, prefetch=None))
        weight = (1.0, 4.0, 16.0)[seed % 3]
        state, found = earned(state, plan, window, case.model, case.system, budget, weight)
        bound = window_bound(
            window, case.model, case.system, budget_bytes=budget, quality_weight=weight,
            effort=effort,
        )  # fmt: skip
        assert found <= bound.reward


def tiny(seed: int) -> tuple[MoESpec, SystemSpec, Window, int]:
    """Two layers of three experts and a menu of two widths: 4096 plans."""
    rng = np.random.default_rng(seed)
    model = replace(random_model(rng, 2, 3, 2), n_dense_layers=0, dense_size=0)
    system = random_system(rng)
    wide, narrow = system.stored_bits[0], system.stored_bits[-1]
    system = replace(system, stored_bits=(wide, narrow), requantise=False)
    window = random_window(rng, model, 2, 6)
    window = replace(window, n_rows=np.maximum(window.n_rows, 1))
    expert16 = model.expert_params * 2
    return model, system, window, int(rng.uniform(0, 4) * expert16)


@pytest.mark.parametrize("seed", range(12))
def test_bound_is_above_the_exhaustive_optimum_of_every_service(seed: int) -> None:
    model, system, window, budget = tiny(seed)
    kinds = ("in_place", "balance", "fetch") if system.far.can_compute else ("fetch",)
    bounds, rewards = [], []
    for kind in kinds:
        service = Service(kind=kind)  # type: ignore[arg-type]
        best = best_plan(window, model, system, budget_bytes=budget, service=service)
        bound = window_bound(window, model, system, budget_bytes=budget, kinds=(kind,))
        assert best.reward <= bound.reward
        assert bound.kind == kind
        bounds.append(bound.reward)
        rewards.append(best.reward)
    together = window_bound(window, model, system, budget_bytes=budget)
    assert max(rewards) <= together.reward <= max(bounds) + 1e-9


@pytest.mark.parametrize("budget", [0, 7000, 10**6])
def test_bound_is_tight_where_nothing_conflicts(budget: int) -> None:
    """One expert at a time, nothing in parallel: places and widths follow from their price."""
    model = replace(MODEL, top_k=1, n_experts=2, gate_profile=(1.0,))
    system = replace(SYSTEM, overlap=0.0)
    window = window_of([[[[0], [1]]] * 4], gates=(1.0,))
    best = best_plan(window, model, system, budget_bytes=budget)
    bound = window_bound(window, model, system, budget_bytes=budget, kinds=("in_place",))
    assert best.reward <= bound.reward <= best.reward + 2e-3


def test_exhaustive_optimum_earns_what_transition_says_and_no_plan_earns_more() -> None:
    model, system, window, budget = tiny(3)
    best = best_plan(window, model, system, budget_bytes=budget)
    assert best.n_plans == 4096
    fresh = initial_state(model, system)
    _, found = earned(fresh, best.plan, window, model, system, budget)
    assert found == best.reward
    rng = np.random.default_rng(0)
    for _ in range(50):
        tier = rng.integers(0, 2, (2, 3)).astype(np.uint8)
        bits = rng.choice(np.array(system.stored_bits, np.uint8), (2, 3))
        plan = Plan(placement=replace(best.plan.placement, tier=tier, bitwidth=bits))
        assert earned(fresh, plan, window, model, system, budget)[1] <= best.reward + 1e-12


def test_exhaustive_optimum_starts_from_a_state() -> None:
    """A copy that has to come over the link first is worth less than one that is there."""
    model, system, window, _ = tiny(3)
    budget = 10**9
    fresh = initial_state(model, system)
    best = best_plan(window, model, system, budget_bytes=budget)
    far = replace(best.plan.placement, tier=np.ones((2, 3), np.uint8))
    state, _ = transition(fresh, Plan(placement=far), window, model, system, budget_bytes=budget)
    later = best_plan(window, model, system, budget_bytes=budget, state=state)
    assert later.reward <= best.reward


def test_limits_are_said() -> None:
    with pytest.raises(ValueError, match="at most 2000000 plans can be tried, got 16777216"):
        best_plan(window_of([[TOKEN]]), MODEL, SYSTEM, budget_bytes=0)
    idle = replace(window_of([[TOKEN]]), n_rows=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="at least one token"):
        window_bound(idle, MODEL, SYSTEM, budget_bytes=0, quality=QualityModel())


def test_every_row_of_an_evaluation_has_its_regret() -> None:
    result = evaluate(
        ["balance", "oracle_balance", "lru", Prefetching], make_trace(), MODEL, SYSTEM,
        hbm_budget=24_000, batch_sizes=(2,), window=4, bound=True,
    )  # fmt: skip
    rows = {row["policy"]: row for row in result}
    assert rows["Prefetching"]["regret"] is None
    for name in ("all_far4", "balance", "oracle_balance", "lru"):
        row = rows[name]
        assert row["reward"] is not None
        assert row["reward_bound"] is not None
        assert row["regret"] == pytest.approx(row["reward_bound"] - row["reward"])
        assert row["reward"] < row["reward_bound"]
    bounds = [rows[name]["reward_bound"] for name in ("all_far4", "balance", "lru")]
    assert bounds[0] == bounds[1] != bounds[2]
    most = rows["lru"]["reward_bound_any_service"]
    assert most is not None
    assert most >= max(bound for bound in bounds if bound is not None)


class Prefetching(Lru):
    """Hides copies behind other layers, which the bound does not cover."""

    def __call__(self, observation: Observation) -> Plan:
        plan = super().__call__(observation)
        assert plan.service is not None
        return replace(plan, service=replace(plan.service, prefetch=Prefetch(recall=1.0)))


def test_table_shows_regret_only_where_it_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [sample_row("good"), sample_row("fair", reward_bound=0.5, regret=0.4321)]
    print_tables(EvaluationResult(rows=rows), width=150)
    text = capsys.readouterr().out
    assert "0.432" in text
    assert "regret: to proved upper bounds of the reward by service, 0.500" in text
    print_tables(EvaluationResult(rows=rows[:1]), width=150)
    assert "regret" not in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(8))
def test_local_search_lies_between_the_reference_and_the_exhaustive_optimum(seed: int) -> None:
    model, system, window, budget = tiny(seed)
    found = search(window, model, system, budget_bytes=budget)
    best = best_plan(window, model, system, budget_bytes=budget)
    state = initial_state(model, system)
    _, reached = earned(state, found.plan, window, model, system, budget)
    assert found.reward == pytest.approx(reached, abs=1e-12)
    assert found.reward <= best.reward + 1e-12
    assert found.reward >= best.reward - 0.3  # local, but not lost
    again = search(window, model, system, budget_bytes=budget, starts=[best.plan.placement])
    assert again.plan.service == system.default_service
    assert again.reward == pytest.approx(best.reward, abs=1e-12)
