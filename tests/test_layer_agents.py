"""Layer agents: plans that keep the budget, the forecast of the heuristics, rewards that add up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ndp_gym import presets
from ndp_gym.agent_file import Agent
from ndp_gym.conditions import CONDITIONS
from ndp_gym.cost import expert_bytes
from ndp_gym.forecast import Blend, Forecaster, shares
from ndp_gym.inputs import open_trace
from ndp_gym.lanes import Lanes
from ndp_gym.layer_agents import ACTIONS, LayerAgents, layer_rewards
from ndp_gym.layer_env import LayerVecEnv, LayerVecEnvs
from ndp_gym.layer_features import FEATURES
from ndp_gym.layer_forecast import LaneForecaster
from ndp_gym.plan import HBM
from ndp_gym.planners import facts_of
from ndp_gym.quality import QualityModel
from ndp_gym.reward import reward, reward_terms
from ndp_gym.scenarios import condition_tasks, run_episodes
from ndp_gym.specs import SystemSpec
from policies.agent import LayerAgent
from policies.balance_feedback import BalanceFeedback
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM
from tests.toy_conditions import TOY_DRIFT

TRACE = make_trace()
N, L = 3, MODEL.n_layers


def lanes_of(n_lanes: int = N, system: SystemSpec = SYSTEM, hbm_budget: Any = 0.3) -> Lanes:
    lanes = Lanes(
        TRACE, MODEL, system, n_lanes=n_lanes, batch_size=3, window=4, hbm_budget=hbm_budget
    )
    for lane in range(n_lanes):
        lanes.reset(lane, np.random.default_rng(lane).permutation(len(TRACE.requests)))
    return lanes


def agents_of(lanes: Lanes) -> LayerAgents:
    return LayerAgents(
        lanes.model, lanes.system, QualityModel(), 4.0, lanes.window, n_lanes=lanes.n_lanes
    )


def actions_of(rng: np.random.Generator, n_lanes: int = N) -> NDArray[np.float64]:
    return rng.uniform(-1, 1, (n_lanes, L, len(ACTIONS)))


def test_no_layer_can_take_bytes_from_another() -> None:
    trace = open_trace()
    model, system = presets.model("minimoe-16b"), presets.system("h100_cxl_seed_ndp")
    lanes = Lanes(trace, model, system, hbm_budget=0.1)
    lanes.reset(0, trace.split_requests("val"))
    size = {bits: expert_bytes(model, system.format, bits) for bits in system.stored_bits}

    def layer_bytes(actions: NDArray[np.float64]) -> NDArray[np.float64]:
        agents = LayerAgents(model, system, QualityModel(), 4.0, 16)
        agents.observe(lanes.observe())
        tier, bits, *_ = agents.decide(actions)
        return np.where(tier == HBM, np.vectorize(size.get)(bits), 0).sum(axis=-1)[0]

    rest = layer_bytes(np.zeros((1, model.n_layers, 4)))
    greedy = np.zeros((1, model.n_layers, 4))
    greedy[:, 0, :2] = 1.0
    taken = layer_bytes(greedy) - rest
    assert np.abs(taken).max() <= size[4]
    assert taken[2:].min() > -0.01 * rest.max()


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.3, 1.0])
def test_whatever_the_actions_plans_keep_the_budget(budget: float) -> None:
    lanes, rng = lanes_of(hbm_budget=budget), np.random.default_rng(0)
    agents = agents_of(lanes)
    for _ in range(8):
        features = agents.observe(lanes.observe())
        assert features.shape == (N, L, len(FEATURES))
        assert features.dtype == np.float32
        assert np.isfinite(features).all()
        assert np.abs(features).max() <= 5
        outcome = lanes.advance(*agents.decide(actions_of(rng)))
        assert (outcome.n_repaired == 0).all()
        assert (outcome.tokens > 0).all()


@pytest.mark.parametrize("n_threads", [1, N])
def test_a_copy_decides_as_it_would_alone(n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndp_gym.batch._n_threads", lambda: n_threads)
    together, rng = lanes_of(), np.random.default_rng(1)
    alone = [lanes_of(lane + 1) for lane in range(N)]  # lane i of each has the same requests
    agents, singles = agents_of(together), [agents_of(lanes) for lanes in alone]
    for _ in range(5):
        actions = actions_of(rng)
        features = agents.observe(together.observe())
        decided = agents.decide(actions)
        together.advance(*decided)
        for lane, (lanes, single) in enumerate(zip(alone, singles, strict=True)):
            np.testing.assert_array_equal(
                single.observe(lanes.observe())[lane], features[lane], strict=True
            )
            mine = single.decide(actions[: lane + 1])
            for one, other in zip(mine, decided, strict=True):
                np.testing.assert_array_equal(one[lane], other[lane])
            lanes.advance(*mine)


def test_lanes_that_nobody_looks_at_are_planned_for_all_the_same() -> None:
    lanes, rng = lanes_of(), np.random.default_rng(4)
    agents, blind = agents_of(lanes), agents_of(lanes)
    for _ in range(3):
        observations, actions = lanes.observe(), actions_of(rng)
        features = agents.observe(observations)
        np.testing.assert_array_equal(blind.observe(observations, n_shown=2), features[:2])
        decided = agents.decide(actions)
        for one, other in zip(blind.decide(actions), decided, strict=True):
            np.testing.assert_array_equal(one, other)
        lanes.advance(*decided)


def test_a_lane_told_another_machine_decides_as_agents_made_for_it() -> None:
    trace = open_trace()
    model, system = presets.model("minimoe-16b"), presets.system("h100_cxl_seed_ndp")
    rng, domain = np.random.default_rng(3), trace.requests.domain
    order = trace.split_requests("val")
    drawn_from = CONDITIONS["drift"]
    together = Lanes(trace, model, system, n_lanes=3, conditions=drawn_from)
    agents = LayerAgents(model, system, QualityModel(), 4.0, 16, n_lanes=3)
    singles = []
    for lane in range(3):
        order, condition = drawn_from.draw_episode(rng, together.base, order, domain)
        together.reset(lane, order, condition)
        agents.reset(lane, condition.system, condition.quality_weight)
        alone = Lanes(trace, model, system, conditions=drawn_from)
        alone.reset(0, order, condition)
        own = LayerAgents(model, condition.system, QualityModel(), condition.quality_weight, 16)
        singles.append((alone, own))
    for _ in range(8):
        actions = rng.uniform(-1, 1, (3, model.n_layers, len(ACTIONS)))
        features = agents.observe(together.observe())
        decided = agents.decide(actions)
        together.advance(*decided)
        for lane, (alone, own) in enumerate(singles):
            mine = own.observe(alone.observe())
            np.testing.assert_array_equal(mine[0], features[lane], strict=True)
            plan = own.decide(actions[lane : lane + 1])
            for one, other in zip(plan, decided, strict=True):
                np.testing.assert_array_equal(one[0], other[lane])
            alone.advance(*plan)
    agents.reset(0)
    again = LayerAgents(model, system, QualityModel(), 4.0, 16)
    together.reset(0, order)
    observations = together.observe()
    fresh = again.observe({name: array[:1] for name, array in observations.items()})
    np.testing.assert_array_equal(agents.observe(observations)[0], fresh[0])


def test_the_forecast_at_rest_is_that_of_the_forecaster() -> None:
    lanes, rng = lanes_of(), np.random.default_rng(2)
    agents = agents_of(lanes)
    batched = LaneForecaster(N, lanes.shape)
    singles = [Forecaster(Blend(), MODEL.top_k) for _ in range(N)]
    for _ in range(6):
        observations = lanes.observe()
        mixed = batched.mixed(batched(observations), np.zeros((N, L)))
        for lane, single in enumerate(singles):
            one = single({name: array[lane] for name, array in observations.items()})
            np.testing.assert_allclose(shares(one.load), shares(mixed[lane]), atol=1e-9)
        agents.observe(observations)
        lanes.advance(*agents.decide(actions_of(rng)))


def test_agents_that_do_nothing_are_balance_feedback() -> None:
    tasks = condition_tasks(conditions="drift", n_episodes=2, max_windows=8, seed=1)
    base = {"price": 1.3, "hysteresis": 0.1, "decay": 0.7, "gain": 0.5}
    nothing = LayerAgent.of(constant_agent(0.0, base))
    idle, planner = (run_episodes(p, tasks).reward for p in (nothing, BalanceFeedback(**base)))
    np.testing.assert_array_equal(idle, planner)
    busy = run_episodes(LayerAgent.of(constant_agent(0.5, base)), tasks).reward
    assert (busy != planner).all()


def constant_agent(action: float, base: dict[str, float]) -> Agent:
    """It answers ``action`` four times, whatever it sees."""
    weight = np.zeros((len(ACTIONS), len(FEATURES)), np.float32)
    bias = np.full(len(ACTIONS), action, np.float32)
    return Agent(features=FEATURES, layers=[(weight, bias)], base=base, card={})


def test_far_value_fills_hbm_and_price_buys_seconds_with_bits() -> None:
    trace = open_trace()
    model, system = presets.model("minimoe-16b"), presets.system("h100_cxl_seed_ndp")
    lanes = Lanes(trace, model, system, hbm_budget=0.1)
    lanes.reset(0, trace.split_requests("val"))
    agents = LayerAgents(model, system, QualityModel(), 4.0, 16)
    agents.observe(lanes.observe())

    def decided(name: str, value: float) -> Any:
        actions = np.zeros((1, model.n_layers, len(ACTIONS)))
        actions[..., ACTIONS.index(name)] = value
        return agents.decide(actions)

    low, high = decided("far_value", -1), decided("far_value", 1)
    assert (high.tier == HBM).sum() > 1.05 * (low.tier == HBM).sum()
    low, high = decided("price", -1), decided("price", 1)
    assert high.bits.mean() < low.bits.mean() - 0.3


def test_a_far_device_that_only_stores_is_no_special_case() -> None:
    system = replace(SYSTEM, far=replace(SYSTEM.far, can_compute=False))
    lanes, rng = lanes_of(system=system, hbm_budget=0.02), np.random.default_rng(3)
    agents = agents_of(lanes)
    for _ in range(4):
        agents.observe(lanes.observe())
        outcome = lanes.advance(*agents.decide(actions_of(rng)))
    assert (outcome.fetch_bytes > 0).any()


def test_actions_that_mean_nothing_are_refused() -> None:
    lanes = lanes_of()
    agents = agents_of(lanes)
    with pytest.raises(ValueError, match="observe"):
        agents.decide(np.zeros((N, L, 4)))
    agents.observe(lanes.observe())
    with pytest.raises(ValueError, match="finite"):
        agents.decide(np.full((N, L, 4), np.nan))
    with pytest.raises(ValueError, match="no features"):
        LayerAgents(MODEL, SYSTEM, QualityModel(), 4.0, 4, features={"luck": (0.0, 1.0)})


def test_a_layers_reward_is_what_the_windows_reward_lacks_without_it() -> None:
    lanes, rng = lanes_of(), np.random.default_rng(4)
    agents = agents_of(lanes)
    agents.observe(lanes.observe())
    outcome = lanes.advance(*agents.decide(actions_of(rng)))
    own = layer_rewards(outcome, MODEL, QualityModel(), 4.0)
    whole = reward(reward_terms(outcome), 4.0)
    for layer in range(L):
        without = outcome.decode_s - outcome.layer_s[:, layer] + outcome.ref_layer_s[:, layer]
        speed = np.log(outcome.ref_decode_s / without)
        others = [i for i in range(L) if i != layer]
        error = (outcome.layer_error - outcome.ref_layer_error) / outcome.layer_energy
        weights = facts_of(MODEL, SYSTEM, QualityModel(), 1.0, 4).loss[:, -1, 0]
        weights = 3.0 * weights / weights.sum()
        rest = speed - 4.0 * (error * weights)[:, others].sum(axis=1)
        np.testing.assert_allclose(own[:, layer] / L, whole - rest, rtol=1e-9)


def test_rewards_of_agents_that_do_nothing_are_0() -> None:
    env = vec_env(conditions=TOY_DRIFT, max_windows=4)
    env.seed(0)
    env.reset()
    for _ in range(9):
        _, rewards, _, _ = env.step(np.zeros((N * L, 4)))
        np.testing.assert_array_equal(rewards, 0.0)
    _, rewards, _, _ = env.step(np.ones((N * L, 4)))
    assert (rewards != 0).any()


def vec_env(n_lanes: int = N, **kwargs: Any) -> LayerVecEnv:
    defaults = {"trace": TRACE, "model": MODEL, "system": SYSTEM, "batch_size": 3, "window": 4}
    return LayerVecEnv(n_lanes, **{**defaults, "hbm_budget": 0.3, "max_windows": 5, **kwargs})


def test_the_vec_env_pays_what_is_gained_over_the_planner_and_restarts() -> None:
    env, rng = vec_env(own=0.0), np.random.default_rng(0)
    alone = vec_env(own=0.0)  # the planner left alone: its rewards are 0, its returns are not
    alone.seed(0)
    alone.reset()
    env.seed(0)
    first = env.reset()
    total = np.zeros(N)
    for step in range(10):
        observations, rewards, done, infos = env.step(rng.uniform(-1, 1, (N * L, 4)))
        per_copy = rewards.reshape(N, L)
        assert (per_copy == per_copy[:, :1]).all()
        total += per_copy[:, 0] / 3.0
        planner = alone.step(np.zeros((N * L, 4)))[3]
        assert done.all() == (step % 5 == 4)
        if done.all():
            returns = [infos[lane * L]["episode"]["r"] for lane in range(N)]
            planned = [planner[lane * L]["episode"]["r"] for lane in range(N)]
            np.testing.assert_allclose(np.subtract(returns, planned), total, rtol=1e-4, atol=1e-6)
            assert all("terminal_observation" in info for info in infos)
            total[:] = 0
    env.seed(0)
    np.testing.assert_array_equal(env.reset(), first)
    assert observations.shape == first.shape == (N * L, len(FEATURES))


def test_copies_under_drawn_conditions_equal_single_ones() -> None:
    together = vec_env(conditions=TOY_DRIFT)
    together.seed(5)
    observations = together.reset().reshape(N, L, -1)
    singles = [vec_env(conditions=TOY_DRIFT, n_lanes=1) for _ in range(N)]
    for lane, single in enumerate(singles):
        single.seed(5 + lane)
        np.testing.assert_array_equal(single.reset(), observations[lane])
    rng = np.random.default_rng(0)
    for _ in range(12):
        actions = rng.uniform(-1, 1, (N, L, 4))
        observations, rewards, done, infos = together.step(actions.reshape(N * L, 4))
        for lane, single in enumerate(singles):
            own = slice(lane * L, lane * L + L)
            result = single.step(actions[lane])
            for one, other in zip(result[:3], (observations, rewards, done), strict=True):
                np.testing.assert_array_equal(one, other[own])
            ended = [info["episode"]["r"] for info in result[3] if "episode" in info]
            assert ended == [info["episode"]["r"] for info in infos[own] if "episode" in info]
    lanes = together.lanes
    assert len(set(lanes.quality_weights[:N].tolist())) > 1
    assert len({lanes.conditions[i].system.link for i in range(N)}) == N


def test_own_rewards_differ_between_layers() -> None:
    env = vec_env(own=1.0)
    env.seed(0)
    env.reset()
    _, rewards, _, _ = env.step(np.ones((N * L, 4)))
    per_copy = rewards.reshape(N, L)
    assert (per_copy[:, 0] != per_copy[:, 1]).all()
    with pytest.raises(ValueError, match=r"own must be in 0\.\.1"):
        vec_env(own=2.0)


def test_groups_of_other_models_run_as_they_would_alone() -> None:
    wide = replace(MODEL, n_layers=3, n_experts=8, layer_weights=None)
    trace = make_trace(n_layers=3, n_experts=8)
    kinds: list[dict[str, Any]] = [{}, {"trace": trace, "model": wide, "n_lanes": 2}]
    together = LayerVecEnvs([vec_env(**kind) for kind in kinds])
    alone = [vec_env(**kind) for kind in kinds]
    first = alone[0].num_envs
    assert (together.num_envs, together.windows_per_step) == (first + 2 * 3, N + 2)
    together.seed(3)
    for env, seed in zip(alone, (3, 3 + first), strict=True):
        env.seed(seed)
    observations = np.asarray(together.reset())
    np.testing.assert_array_equal(observations, np.concatenate([env.reset() for env in alone]))
    rng = np.random.default_rng(0)
    for _ in range(7):
        actions = rng.uniform(-1, 1, (together.num_envs, 4))
        result = together.step(actions)
        parts = [
            env.step(part) for env, part in zip(alone, np.split(actions, [first]), strict=True)
        ]
        for i in range(3):
            whole = np.concatenate([np.asarray(part[i]) for part in parts])
            np.testing.assert_array_equal(result[i], whole)
        ends = ["episode" in info for info in result[3]]
        assert ends == ["episode" in info for part in parts for info in part[3]]
    with pytest.raises(ValueError, match="at least one environment"):
        LayerVecEnvs([])
