"""Nothing of the future reaches a policy: other ids, lengths and arrivals, same plans up to now."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from ndp_gym import patterns
from ndp_gym.condition import KINDS, Process, Speeds
from ndp_gym.env import NDPPlacementEnv
from ndp_gym.lanes import Lanes
from ndp_gym.outcome import Outcome
from ndp_gym.patterns import train_patterns
from ndp_gym.plan import HBM, Plan
from ndp_gym.policy import InfeasibleError, Policy, PolicyContext, needs_future, resolve
from ndp_gym.rollout import train_profile
from ndp_gym.trace import RoutingTrace
from policies import POLICIES
from policies.agent import LayerAgent
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace(n_conversations=60)
ORDER = TRACE.split_requests("test")
B, W, BUDGET = 3, 3, 12_000  # four of eight experts at 4 bit
SEES_NOTHING_AHEAD = [name for name in POLICIES if not needs_future(resolve(name))]


@pytest.fixture(autouse=True)
def small_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns of requests as short as these, so that agents forecast with what was fitted."""
    monkeypatch.setattr(patterns, "CHUNK", 4)


class Seen(NamedTuple):
    """A run up to a window: what was observed and planned, and how far the slots had come."""

    observations: list[dict[str, np.ndarray]]
    plans: list[Plan]
    rows: dict[int, int]  # request -> rows replayed before the last of these plans
    last: Outcome  # of the window after it, which no plan may foresee


def lanes_of(trace: RoutingTrace, scheduling: Any) -> Lanes:
    return Lanes(
        trace, MODEL, SYSTEM, batch_size=B, window=W, hbm_budget=BUDGET, scheduling=scheduling
    )


def run(
    name: str | Policy,
    trace: RoutingTrace,
    order: np.ndarray,
    n_windows: int,
    scheduling: Any,
    **condition: Any,
) -> Seen:
    """Drive a policy, by name or made, for ``n_windows``; ``condition``: fields of `Condition`."""
    lanes = lanes_of(trace, scheduling)
    lanes.reset(0, order, replace(lanes.base, **condition))
    policy: Policy = resolve(name)() if isinstance(name, str) else name
    policy.reset(
        PolicyContext(
            model=MODEL,
            system=SYSTEM,
            batch_size=B,
            window=W,
            hbm_budget_bytes=BUDGET,
            menu=tuple((tier, bits) for tier in (0, 1) for bits in SYSTEM.stored_bits),
            rng=np.random.default_rng(5),
            profile=train_profile(trace),
            patterns=lambda: train_patterns(trace, MODEL),
        )
    )
    observations, plans, rows = [], [], {}
    for _ in range(n_windows):
        observation = {key: array[0] for key, array in lanes.observe().items()}
        observations.append({key: array.copy() for key, array in observation.items()})
        plans.append(policy(observation))
        schedule = lanes.schedule
        for request, row in zip(schedule.request[0], schedule.row[0], strict=True):
            if request >= 0:
                rows[int(request)] = int(row - trace.requests.start[request])
        plan = plans[-1]
        outcome = lanes.advance(
            plan.placement.tier[None],
            plan.placement.bitwidth[None],
            None if plan.migration_order is None else plan.migration_order[None],
            None if plan.service is None else (plan.service,),
        )
    return Seen(observations, plans, rows, outcome)


def other_future(
    trace: RoutingTrace, order: np.ndarray, rows: dict[int, int], ended: set[int], seed: int
) -> tuple[RoutingTrace, np.ndarray]:
    """The same past, but other rows behind it, other lengths and other requests in line.

    ``rows`` are those each request has shown so far; requests in ``ended`` stay as they are, those
    of the train split too (policies may know them).
    """
    rng = np.random.default_rng(seed)
    requests = trace.requests
    assert trace.gate_weights is not None
    in_line = set(order.tolist())
    ids, gates, length, n_prompt = [], [], [], []
    for index in range(len(requests)):
        start, end = int(requests.start[index]), int(requests.end[index])
        known, prompt = end - start, int(requests.n_prompt[index])
        n_new = 0
        if index in in_line and index not in ended:
            known = rows.get(index, 0)
            n_new = int(rng.integers(1, 30))
            if not known:  # not admitted yet: another prompt too
                prompt = int(rng.integers(1, 9))
                n_new += prompt
        new_ids = rng.random((n_new, trace.n_layers, trace.n_experts)).argsort(axis=2)
        ids += [trace.expert_ids[start : start + known], new_ids[:, :, : trace.top_k]]
        new_gates = rng.dirichlet(np.ones(trace.top_k), (n_new, trace.n_layers))
        gates += [trace.gate_weights[start : start + known], new_gates]
        length.append(known + n_new)
        n_prompt.append(prompt)
    lengths = np.array(length)
    changed = replace(
        requests,
        start=np.cumsum(lengths) - lengths,
        length=lengths,
        n_prompt=np.array(n_prompt),
    )
    arrived = [i for i in order.tolist() if i in rows or i in ended]
    waiting = [i for i in order.tolist() if i not in rows and i not in ended]
    new_order = np.array(arrived + rng.permutation(waiting)[: max(1, len(waiting) // 2)].tolist())
    arrays = np.concatenate(ids), np.concatenate(gates)
    perturbed = RoutingTrace.from_arrays(arrays[0], changed, trace.metadata, gate_weights=arrays[1])
    return perturbed, new_order


def assert_same_plan(one: Plan, other: Plan) -> None:
    np.testing.assert_array_equal(one.placement.tier, other.placement.tier)
    np.testing.assert_array_equal(one.placement.bitwidth, other.placement.bitwidth)
    assert (one.migration_order is None) == (other.migration_order is None)
    if one.migration_order is not None and other.migration_order is not None:
        np.testing.assert_array_equal(one.migration_order, other.migration_order)
    assert one.service == other.service


def split_rows(seen: Seen, trace: RoutingTrace, scheduling: Any) -> tuple[dict[int, int], set[int]]:
    """Rows of the requests still live at the last plan, and the requests that had ended."""
    lanes = lanes_of(trace, scheduling)
    lanes.reset(0, ORDER)
    for plan in seen.plans[:-1]:
        lanes.advance(plan.placement.tier[None], plan.placement.bitwidth[None])
    live = set(lanes.schedule.request[0].tolist())
    return {i: n for i, n in seen.rows.items() if i in live}, set(seen.rows) - live


@pytest.mark.parametrize("scheduling", ["continuous", "static"])
@pytest.mark.parametrize("name", SEES_NOTHING_AHEAD)
def test_no_plan_depends_on_what_comes_after_it(name: str, scheduling: Any) -> None:
    for n_windows in (1, 4, 9):
        try:
            seen = run(name, TRACE, ORDER, n_windows, scheduling)
        except InfeasibleError:
            pytest.skip(f"{name} does not fit this budget")
        rows, ended = split_rows(seen, TRACE, scheduling)
        for seed in range(2):
            trace, order = other_future(TRACE, ORDER, rows, ended, seed)
            again = run(name, trace, order, n_windows, scheduling)
            for one, other in zip(seen.observations, again.observations, strict=True):
                for key in one:
                    np.testing.assert_array_equal(one[key], other[key], err_msg=key)
            for plan, same in zip(seen.plans, again.plans, strict=True):
                assert_same_plan(plan, same)
            assert (seen.last.counts != again.last.counts).any()  # the future did change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEES_NOTHING_AHEAD)
def test_no_plan_knows_when_the_machine_will_change(name: str, kind: Any) -> None:
    """Equal until it changes; that is seen one window later, of a budget at once."""
    onset = 3
    shown = onset if kind == "co_tenant" else onset + 1
    storm = Process(kind=kind, onset=onset, length=2, factor=0.5)
    try:
        calm = run(name, TRACE, ORDER, shown + 1, "continuous")
        rough = run(name, TRACE, ORDER, shown + 1, "continuous", processes=(storm,))
    except InfeasibleError:
        pytest.skip(f"{name} does not fit this budget")
    for window in range(shown):
        for key, array in calm.observations[window].items():
            np.testing.assert_array_equal(array, rough.observations[window][key], err_msg=key)
        assert_same_plan(calm.plans[window], rough.plans[window])
    told = rough.observations[shown]
    changed = {key for key, a in calm.observations[shown].items() if (a != told[key]).any()}
    if kind == "co_tenant":
        assert changed == {"context"}
    elif kind == "gpu_throttle" and not calm.observations[shown]["layer"][:, 0].any():
        assert not changed  # nothing ran there
    else:
        assert changed <= {"layer", "in_flight", "context", "tier", "bitwidth"}


@pytest.mark.parametrize("name", SEES_NOTHING_AHEAD)
def test_hidden_speeds_reach_no_first_plan(name: str) -> None:
    slow = {"speeds": Speeds(0.5, 0.6, 0.7)}
    try:
        one, other = (run(name, TRACE, ORDER, 2, "continuous", **c) for c in ({}, slow))
    except InfeasibleError:
        pytest.skip(f"{name} does not fit this budget")
    for key, array in one.observations[0].items():
        np.testing.assert_array_equal(array, other.observations[0][key], err_msg=key)
    assert_same_plan(one.plans[0], other.plans[0])
    assert (one.observations[1]["layer"] != other.observations[1]["layer"]).any()


def test_every_policy_but_the_oracles_is_tested() -> None:
    blind = set(POLICIES) - set(SEES_NOTHING_AHEAD)
    marked = {"hindsight_static", "expertflow_cache"}
    assert all(name.startswith("oracle") or name in marked for name in blind)
    assert len(SEES_NOTHING_AHEAD) > len(blind)


def test_a_policy_that_peeks_would_be_caught() -> None:
    """The control: plans from the true counts of the window differ once the future differs."""

    def hottest(trace: RoutingTrace, order: np.ndarray) -> np.ndarray:
        lanes = lanes_of(trace, "continuous")
        lanes.reset(0, order)
        return lanes.next_counts(0).sum(axis=0)

    lanes = lanes_of(TRACE, "continuous")
    lanes.reset(0, ORDER)
    rows = {int(i): int(TRACE.requests.n_prompt[i]) for i in lanes.schedule.request[0].tolist()}
    trace, order = other_future(TRACE, ORDER, rows, set(), seed=0)
    assert (hottest(TRACE, ORDER) != hottest(trace, order)).any()


@pytest.mark.parametrize("action", ["scores", "placement", "knobs"])
def test_the_environment_shows_nothing_of_the_future(action: str) -> None:
    """Observations, rewards and infos of equal actions agree as long as the past does."""

    def episode(trace: RoutingTrace, order: np.ndarray, n_windows: int) -> list[Any]:
        env = NDPPlacementEnv(
            trace, MODEL, SYSTEM, B, W, BUDGET, split="test", action=action, max_windows=1000
        )
        env.action_space.seed(2)
        results: list[Any] = [env.reset(seed=0, options={"requests": order.tolist()})[0]]
        for _ in range(n_windows):
            observation, reward, _, _, info = env.step(env.action_space.sample())
            results.append((observation, reward, info))
        return results

    n_windows = 5
    seen = run("all_far", TRACE, ORDER, n_windows + 1, "continuous")
    rows, ended = split_rows(seen, TRACE, "continuous")
    trace, order = other_future(TRACE, ORDER, rows, ended, seed=1)
    _assert_equal(episode(TRACE, ORDER, n_windows), episode(trace, order, n_windows))
    with pytest.raises(AssertionError):
        _assert_equal(episode(TRACE, ORDER, n_windows + 1), episode(trace, order, n_windows + 1))


def _assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            _assert_equal(a, b)
    else:
        np.testing.assert_array_equal(one, other)


def test_the_fitted_forecast_is_exercised() -> None:
    bare = LayerAgent.of(replace(LayerAgent().agent, forecast=None))
    fitted, blended = (run(policy, TRACE, ORDER, 4, "continuous") for policy in ("agent", bare))
    pairs = zip(fitted.plans, blended.plans, strict=True)
    assert any((one.migration_order != other.migration_order).any() for one, other in pairs)


def test_placement_is_exercised() -> None:
    """The budget holds some experts but not all, so that plans can differ at all."""
    seen = run("prefill_topk", TRACE, ORDER, 4, "continuous")
    n_near = [(plan.placement.tier == HBM).sum() for plan in seen.plans]
    assert all(0 < n < 8 for n in n_near)
