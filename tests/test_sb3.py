"""The SB3 adapter against DummyVecEnv: the same episodes, rewards and infos."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from ndp_gym.env import NDPPlacementEnv
from ndp_gym.sb3 import VectorAsVecEnv, make_sb3_env
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

N = 4
KWARGS: dict[str, Any] = {
    "trace": make_trace(), "model": MODEL, "system": SYSTEM, "batch_size": 3, "window": 4,
    "max_windows": 6, "hbm_budget": 0.3,
}  # fmt: skip


def pair(**kwargs: Any) -> tuple[Any, DummyVecEnv]:
    """Our adapter and SB3's own loop over as many monitored single environments."""
    both = KWARGS | kwargs
    return make_sb3_env(num_envs=N, **both), DummyVecEnv(
        [lambda: Monitor(NDPPlacementEnv(**both)) for _ in range(N)]
    )


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name == "episode":
            assert {k: ours[name][k] for k in "rl"} == {k: value[k] for k in "rl"}
        elif isinstance(value, dict):
            assert_equal(ours[name], value)
        else:
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("action", ["scores", "placement", "knobs"])
@pytest.mark.parametrize("max_windows", [6, 1000])
def test_episodes_equal_those_of_dummy_vec_env(action: str, max_windows: int) -> None:
    ours, theirs = pair(action=action, max_windows=max_windows)
    ours.seed(5)
    theirs.seed(5)
    assert_equal(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    episodes = []
    for _ in range(2 * 24):
        actions = np.stack([ours.action_space.sample() for _ in range(N)])
        ours_result, theirs_result = ours.step(actions), theirs.step(actions)
        assert_equal(ours_result[0], theirs_result[0])
        np.testing.assert_array_equal(ours_result[1], theirs_result[1])
        assert ours_result[1].dtype == np.float32
        np.testing.assert_array_equal(ours_result[2], theirs_result[2])
        for mine, other in zip(ours_result[3], theirs_result[3], strict=True):
            assert_equal(mine, other)
            episodes += [mine["episode"]["r"]] if "episode" in mine else []
        for mine, other in zip(ours.reset_infos, theirs.reset_infos, strict=True):
            assert_equal(mine, other)
    assert len(episodes) >= N


def test_without_a_new_seed_the_generators_go_on() -> None:
    ours, theirs = pair()
    for seed in (3, None):
        for env in (ours, theirs):
            if seed is not None:
                env.seed(seed)
        assert_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos[0]["n_requests"] == theirs.reset_infos[0]["n_requests"]


def test_options_are_for_all_copies() -> None:
    ours, theirs = pair()
    for env in (ours, theirs):
        env.seed(0)
        env.set_options({"requests": [4, 9]})
    assert_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos[0]["n_requests"] == 2
    ours.set_options([{"requests": [i]} for i in range(N)])
    with pytest.raises(ValueError, match="same for all copies"):
        ours.reset()


def test_attributes_and_methods_reach_the_copies() -> None:
    env = make_sb3_env(num_envs=3, **KWARGS, render_mode="ansi")
    env.reset()
    assert env.get_attr("num_envs", indices=[0, 2]) == [3, 3]
    assert env.has_attr("episodes")
    assert not env.has_attr("action_masks")
    assert [text[:8] for text in env.env_method("render", indices=1)] == ["window 0"]
    assert env.env_is_wrapped(TimeLimit) == [False] * 3
    assert env.env_is_wrapped(Monitor, indices=0) == [True]
    env.set_attr("label", "x")
    assert env.get_attr("label") == ["x"] * 3
    with pytest.raises(ValueError, match="all or none"):
        env.set_attr("label", "y", indices=0)
    env.close()


def test_only_same_step_autoreset_is_accepted() -> None:
    envs = gym.make_vec("NDPPlacement-v0", 2, vectorization_mode="vector_entry_point", **KWARGS)
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorAsVecEnv(envs)


def test_ppo_learns_on_it_in_the_usual_way() -> None:
    import torch
    from stable_baselines3 import PPO

    torch.set_num_threads(1)
    env = VecNormalize(make_sb3_env(num_envs=N, action="knobs", **KWARGS), norm_reward=False)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0)
    model.learn(64)
    assert model.num_timesteps == 64
    assert len(model.ep_info_buffer) >= N
