"""The vector environment against as many single ones, step by step, to the last bit."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, NormalizeReward, RecordEpisodeStatistics

from ndp_gym import ENV_ID
from ndp_gym.env import NDPPlacementEnv
from ndp_gym.vector import NDPPlacementVectorEnv
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace()
N_ENVS = 5
MODES = ["next_step", "same_step"]


def arguments(**kwargs: Any) -> dict[str, Any]:
    defaults = {"trace": TRACE, "model": MODEL, "system": SYSTEM, "batch_size": 3, "window": 4}
    return defaults | {"max_windows": 6, "hbm_budget": 0.3} | kwargs


def both(mode: str, **kwargs: Any) -> tuple[NDPPlacementVectorEnv, SyncVectorEnv]:
    ours = NDPPlacementVectorEnv(N_ENVS, autoreset_mode=mode, **arguments(**kwargs))
    makers = [lambda: NDPPlacementEnv(**arguments(**kwargs))] * N_ENVS
    return ours, SyncVectorEnv(makers, autoreset_mode=ours.autoreset_mode)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal in structure, type and every bit; infos may hold infos and objects."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert ours.dtype == object
        assert_same(tuple(ours), tuple(theirs), where)
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype, where
        np.testing.assert_array_equal(ours, theirs, err_msg=where)
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduling", ["continuous", "static"])
@pytest.mark.parametrize("action", ["scores", "placement", "knobs"])
def test_copies_behave_like_single_environments(action: str, scheduling: str, mode: str) -> None:
    ours, theirs = both(mode, action=action, scheduling=scheduling)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=7), theirs.reset(seed=7))
    ours.action_space.seed(1)
    n_ended = 0
    for _ in range(20):
        actions = ours.action_space.sample()
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
        n_ended += int(result[3].sum())
    assert n_ended > N_ENVS


@pytest.mark.parametrize("mode", MODES)
def test_copies_whose_requests_run_out_at_different_times_restart_alone(mode: str) -> None:
    ours, theirs = both(mode, max_windows=1000, hbm_budget=[0.05, 0.5], batch_size=8)
    assert_same(ours.reset(seed=[3, 1, 5, 9, 2]), theirs.reset(seed=[3, 1, 5, 9, 2]))
    ours.action_space.seed(1)
    ended = []
    for _ in range(40):
        actions = ours.action_space.sample()
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
        ended.append(result[3])
    partly = [flags.any() and not flags.all() for flags in ended]
    assert any(partly)


def test_options_reach_every_copy() -> None:
    ours, theirs = both("next_step")
    options = {"requests": [4, 9]}
    assert_same(ours.reset(seed=0, options=options), theirs.reset(seed=0, options=options))
    with pytest.raises(ValueError, match="options must be"):
        ours.reset(options={"start": 1})


def test_without_a_seed_the_generators_go_on() -> None:
    ours, theirs = both("next_step")
    for seed in (11, None, None):
        assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))


def test_disabled_autoreset_leaves_resets_to_the_caller() -> None:
    ours, theirs = both("disabled", max_windows=2)
    with pytest.raises(ResetNeeded, match="first reset"):
        ours.reset(options={"reset_mask": np.array([True] + [False] * 4)})
    assert_same(ours.reset(seed=0), theirs.reset(seed=0))
    ours.action_space.seed(0)
    for _ in range(2):
        actions = ours.action_space.sample()
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
    assert result[3].all()
    with pytest.raises(ResetNeeded, match=r"episodes \[0, 1, 2, 3, 4\] have ended"):
        ours.step(actions)
    mask = np.array([True, False, True, True, True])
    assert_same(
        ours.reset(options={"reset_mask": mask.tolist()}),
        theirs.reset(options={"reset_mask": mask.copy()}),
    )
    with pytest.raises(ResetNeeded, match=r"episodes \[1\]"):
        ours.step(actions)
    with pytest.raises(ValueError, match="boolean array"):
        ours.reset(options={"reset_mask": np.zeros(5, np.bool_)})


def test_step_before_reset_is_refused() -> None:
    ours, _ = both("next_step")
    with pytest.raises(ResetNeeded):
        ours.step(ours.action_space.sample())


def test_observations_are_fresh_arrays() -> None:
    ours, _ = both("same_step")
    kept = [ours.reset(seed=0)[0]]
    ours.action_space.seed(0)
    kept += [ours.step(ours.action_space.sample())[0] for _ in range(8)]
    for i, one in enumerate(kept):
        for other in kept[i + 1 :]:
            assert not any(np.shares_memory(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_make_vec_uses_the_native_one_and_its_spec_survives_json(mode: str) -> None:
    kwargs = {"num_envs": 3, "vectorization_mode": "vector_entry_point"}
    envs = gym.make_vec(ENV_ID, **kwargs, autoreset_mode=mode, hbm_budget=0.2)
    assert isinstance(envs.unwrapped, NDPPlacementVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode[mode.upper()]
    assert envs.spec is not None
    again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()), **kwargs)
    envs.action_space.seed(0)
    assert_same(again.reset(seed=4), envs.reset(seed=4))
    for _ in range(3):
        actions = envs.action_space.sample()
        assert_same(again.step(actions), envs.step(actions))


@pytest.mark.parametrize("mode", MODES)
def test_gymnasiums_vector_wrappers_accept_it(mode: str) -> None:
    envs: Any = NDPPlacementVectorEnv(N_ENVS, autoreset_mode=mode, **arguments(max_windows=3))
    envs = DictInfoToList(NormalizeReward(RecordEpisodeStatistics(envs)))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    lengths = []
    for _ in range(8):
        infos = envs.step(envs.action_space.sample())[4]
        assert len(infos) == N_ENVS
        lengths += [info["episode"]["l"] for info in infos if "episode" in info]
    # Gymnasium 1.2 counts the first step after a same-step reset to the episode before
    assert max(lengths, default=0) == 3


@pytest.mark.parametrize("name", ["NEXT_STEP", "next_step", "NextStep", AutoresetMode.NEXT_STEP])
def test_autoreset_modes_have_several_spellings(name: Any) -> None:
    envs = NDPPlacementVectorEnv(1, autoreset_mode=name, **arguments())
    assert envs.autoreset_mode is AutoresetMode.NEXT_STEP


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"autoreset_mode": "later"}, "autoreset_mode must be one of"),
        ({"num_envs": 0}, "num_envs must be >= 1, got 0"),
    ],
)
def test_a_bad_argument_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NDPPlacementVectorEnv(**arguments(**kwargs))


def test_seeds_must_be_as_many_as_copies() -> None:
    ours, _ = both("next_step")
    with pytest.raises(ValueError, match="num_envs=5 entries, got 2"):
        ours.reset(seed=[1, 2])


def test_render_gives_one_text_per_copy() -> None:
    envs = NDPPlacementVectorEnv(2, **arguments(render_mode="ansi"))
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())
    texts = envs.render()
    assert texts is not None
    assert [text.splitlines()[0] for text in texts] == ["window 1, 12 tokens"] * 2
