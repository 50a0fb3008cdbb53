"""The registered environments whose episodes draw what they run under."""

import json
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from ndp_gym import ENV_ID, ENV_IDS
from ndp_gym.env import NDPPlacementEnv
from ndp_gym.policy import CONTEXT_NAMES
from ndp_gym.sb3 import make_sb3_env
from ndp_gym.vector import NDPPlacementVectorEnv
from tests.test_vector import arguments, assert_same
from tests.toy_conditions import TOY_DRIFT, TOY_RAND

DRAWN = [env_id for env_id in ENV_IDS if env_id != ENV_ID]


def pair(n_envs: int, **kwargs: Any) -> tuple[NDPPlacementVectorEnv, SyncVectorEnv]:
    ours = NDPPlacementVectorEnv(n_envs, **kwargs)
    makers = [lambda: NDPPlacementEnv(**kwargs)] * n_envs
    return ours, SyncVectorEnv(makers, autoreset_mode=ours.autoreset_mode)


@pytest.mark.parametrize(
    ("conditions", "scheduling"), [(TOY_RAND, "static"), (TOY_DRIFT, "continuous")]
)
@pytest.mark.parametrize("action", ["scores", "placement", "knobs"])
def test_copies_equal_single_environments(conditions: Any, action: str, scheduling: Any) -> None:
    drawn = {"action": action, "scheduling": scheduling, "conditions": conditions}
    ours, theirs = pair(4, **arguments(**drawn))
    assert ours.observation_space == theirs.observation_space
    assert_same(ours.reset(seed=7), theirs.reset(seed=7))
    ours.action_space.seed(1)
    for _ in range(16):
        actions = ours.action_space.sample()
        assert_same(ours.step(actions), theirs.step(actions))


@pytest.mark.parametrize("env_id", DRAWN)
def test_presets_step_natively_and_equal_single_environments(env_id: str) -> None:
    kwargs = {"action": "knobs", "max_windows": 3}
    ours = gym.make_vec(env_id, 3, vectorization_mode="vector_entry_point", **kwargs)
    theirs = gym.make_vec(env_id, 3, vectorization_mode="sync", **kwargs)
    assert isinstance(ours.unwrapped, NDPPlacementVectorEnv)
    assert_same(ours.reset(seed=2), theirs.reset(seed=2))
    ours.action_space.seed(0)
    for _ in range(5):
        actions = ours.action_space.sample()
        assert_same(ours.step(actions), theirs.step(actions))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("env_id", DRAWN)
def test_checkers_of_gymnasium_and_sb3_find_nothing(env_id: str) -> None:
    env = gym.make(env_id, action="knobs")
    check_env(env.unwrapped, skip_render_check=True)
    sb3_check_env(env.unwrapped)


@pytest.mark.parametrize("env_id", DRAWN)
def test_an_id_is_the_environment_with_its_preset_and_survives_json(env_id: str) -> None:
    by_id = gym.make(env_id, action="knobs")
    by_name = gym.make(ENV_ID, action="knobs", **ENV_IDS[env_id])
    assert by_id.spec is not None
    again = gym.make(EnvSpec.from_json(by_id.spec.to_json()))
    assert json.loads(by_id.spec.to_json())["kwargs"]["conditions"] == ENV_IDS[env_id]["conditions"]
    expected = by_id.reset(seed=3)
    for env in (by_name, again):
        assert_same(env.reset(seed=3), expected)
        action = np.zeros(8, np.float32)
        assert_same(env.step(action)[0], by_id.step(action)[0])
        by_id.reset(seed=3)


@pytest.mark.parametrize("action", ["scores", "placement"])
def test_observations_stay_within_bounds_under_any_condition(action: str) -> None:
    env = NDPPlacementEnv(**arguments(action=action, conditions=TOY_DRIFT, max_windows=6))
    highest = np.zeros(env.observation_space["layer"].shape)
    seen = set()
    for seed in range(40):
        env.action_space.seed(seed)
        observation, info = env.reset(seed=seed)
        seen.add(info["condition"]["batch_size"])
        for _ in range(6):
            for name, array in observation.items():
                assert array in env.observation_space[name], name
            highest = np.maximum(highest, observation["layer"])
            observation = env.step(env.action_space.sample())[0]
    assert seen == {1, 2, 3}
    share = highest.reshape(2, 5).max(0) / env.observation_space["layer"].high[:5]
    assert (share > 0.03).all()  # the slowest machines come near them


def test_info_separates_what_is_told_from_what_is_hidden() -> None:
    env = NDPPlacementEnv(**arguments(conditions=TOY_DRIFT))
    observation, info = env.reset(seed=4)
    context = dict(zip(CONTEXT_NAMES, observation["context"].tolist(), strict=True))
    told, hidden = info["condition"], info["hidden"]
    for name in ("batch_size", "quality_weight", "link_bytes_per_s", "far_bytes_per_s"):
        assert context[name] == np.float32(told[name])
    assert not hidden.keys() & told.keys()
    assert 0.4 <= hidden["gpu_speed"] <= 1
    lane = env.unwrapped.episodes.lanes.conditions[0]
    for process in lane.processes:
        assert hidden[f"{process.kind}_onset"] == process.onset


def test_a_budget_range_still_draws_beside_conditions_that_leave_it_alone() -> None:
    drawn = replace(TOY_RAND, hbm_budget=None)
    env = NDPPlacementEnv(**arguments(conditions=drawn, hbm_budget=[0.2, 0.5]))
    budgets = {env.reset(seed=seed)[1]["hbm_budget_bytes"] for seed in range(20)}
    assert len(budgets) == 20
    assert min(budgets) >= 0.2 * 96_000
    assert max(budgets) <= 0.5 * 96_000


def test_sb3_gets_nested_infos_per_copy() -> None:
    env = make_sb3_env(num_envs=3, **arguments(conditions=TOY_RAND))
    env.seed(0)
    env.reset()
    single = NDPPlacementEnv(**arguments(conditions=TOY_RAND))
    for copy in range(3):
        info = single.reset(seed=copy)[1]
        mine = env.reset_infos[copy]["condition"]
        assert {name: float(mine[name]) for name in mine} == {
            name: float(value) for name, value in info["condition"].items()
        }
