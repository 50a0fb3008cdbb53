"""The environment as a user of Gymnasium meets it."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from ndp_gym import ENV_ID, env_docs
from ndp_gym.env import NDPPlacementEnv
from ndp_gym.inputs import DEFAULT_SYSTEM
from ndp_gym.policy import CONTEXT_NAMES
from ndp_gym.trace import RoutingTrace
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

ENCODINGS = ("scores", "placement", "knobs")
TRACE = make_trace()
STORAGE = replace(SYSTEM, far=replace(SYSTEM.far, can_compute=False, flops_per_s=0.0))
SERIAL = replace(SYSTEM, overlap=0.3)


def make(**kwargs: Any) -> NDPPlacementEnv:
    defaults = {"trace": TRACE, "model": MODEL, "system": SYSTEM, "batch_size": 3, "window": 4}
    return NDPPlacementEnv(**(defaults | kwargs))


def play(env: gym.Env[Any, Any], seed: int, n_steps: int = 40) -> Iterator[tuple[Any, ...]]:
    """Observations and what came with them, for seeded random actions; resets where it ends."""
    env.action_space.seed(seed)
    yield env.reset(seed=seed)
    for _ in range(n_steps):
        result = env.step(env.action_space.sample())
        yield result
        if result[3]:
            yield env.reset()


def digest(env: gym.Env[Any, Any]) -> str:
    """A hash of everything that an episode gives: arrays, rewards, flags, infos."""
    sha = hashlib.sha256()
    for result in play(env, seed=3):
        for part in result:
            for value in part.values() if isinstance(part, dict) else [part]:
                sha.update(
                    value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
                )
    return sha.hexdigest()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("action", ENCODINGS)
def test_checkers_of_gymnasium_and_sb3_find_nothing(action: str) -> None:
    env = gym.make(ENV_ID, trace=TRACE, model=MODEL, system=SYSTEM, action=action, window=4)
    check_env(env.unwrapped)
    sb3_check_env(env.unwrapped)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("action", ENCODINGS)
def test_gym_make_adds_checkers_that_stay_silent(action: str) -> None:
    env = gym.make(ENV_ID, trace=TRACE, model=MODEL, system=SYSTEM, action=action, window=4)
    for _ in play(env, seed=0, n_steps=10):
        pass


@pytest.mark.parametrize("action", ENCODINGS)
@pytest.mark.parametrize("scheduling", ["continuous", "static"])
@pytest.mark.parametrize("system", [SYSTEM, STORAGE, SERIAL], ids=["in place", "fetch", "serial"])
@pytest.mark.parametrize("budget", [0.3, "auto"])
def test_observations_stay_within_finite_bounds(
    action: str, scheduling: str, system: Any, budget: Any
) -> None:
    env = make(action=action, scheduling=scheduling, system=system, hbm_budget=budget)
    for box in env.observation_space.values():
        assert np.isfinite(box.low).all()
        assert np.isfinite(box.high).all()
        assert (box.low < box.high).all()
    for seed in range(3):
        for observation, *_ in play(env, seed):
            for name, array in observation.items():
                assert array in env.observation_space[name], name


def test_bounds_are_not_far_from_what_happens() -> None:
    """Loads and bits reach theirs; a second of the far device is not a thousandth of its bound."""
    env = make(system=SYSTEM, hbm_budget=0.3, batch_size=2, window=2)
    highest = {name: np.zeros(box.shape) for name, box in env.observation_space.items()}
    for observation, *_ in play(env, seed=0, n_steps=200):
        for name, array in observation.items():
            highest[name] = np.maximum(highest[name], array)
    for name in ("last_load", "tier", "bitwidth", "in_flight"):
        assert highest[name].max() == env.observation_space[name].high.max(), name
    share = highest["layer"].reshape(2, 5).max(0) / env.observation_space["layer"].high[:5]
    assert (share > 0.05).all()


@pytest.mark.parametrize("action", ENCODINGS)
def test_equal_seeds_and_actions_give_equal_episodes(action: str) -> None:
    assert digest(make(action=action)) == digest(make(action=action))


def test_two_processes_agree_to_the_last_bit() -> None:
    program = "from tests.test_env import *; print(*(digest(make(action=a)) for a in ENCODINGS))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
        ).stdout
        for _ in range(2)
    }
    assert outputs == {" ".join(digest(make(action=a)) for a in ENCODINGS) + "\n"}


def test_observations_are_fresh_arrays() -> None:
    env = make()
    kept = [(obs, {k: v.copy() for k, v in obs.items()}) for obs, *_ in play(env, seed=1)]
    for i, (observation, copy) in enumerate(kept):
        for name, array in observation.items():
            np.testing.assert_array_equal(array, copy[name])
            assert not any(np.shares_memory(array, later[0][name]) for later in kept[i + 1 :])


@pytest.mark.parametrize("max_windows", [10**6, None])
def test_an_episode_ends_when_its_requests_have_ended(max_windows: int | None) -> None:
    env = make(max_windows=max_windows)
    order = TRACE.split_requests("train")
    env.action_space.seed(0)
    for options, expected in ((None, order), ({"requests": [5, 2]}, np.array([5, 2]))):
        _, info = env.reset(seed=0, options=options)
        assert info["n_requests"] == len(expected)
        tokens, truncated = 0, False
        while not truncated:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            tokens += info["tokens"]
            assert terminated is False
        assert tokens == TRACE.requests.n_decode[expected].sum()


def test_an_episode_ends_after_max_windows() -> None:
    env = make(max_windows=2)
    env.reset(seed=0)
    env.action_space.seed(0)
    flags = [env.step(env.action_space.sample())[3] for _ in range(2)]
    assert flags == [False, True]
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(env.action_space.sample())


def test_a_step_before_reset_is_refused() -> None:
    env = make()
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())


def test_reset_permutes_the_split_and_options_do_not() -> None:
    env = make(batch_size=30)
    slots = env.episodes.lanes.schedule.request
    train = set(TRACE.split_requests("train").tolist())
    orders = []
    for seed in (0, 1, 0):
        env.reset(seed=seed)
        orders.append(slots[0][slots[0] >= 0].tolist())
    assert orders[0] == orders[2] != orders[1]
    assert set(orders[0]) == set(orders[1]) == train
    env.reset(options={"requests": [7, 1, 4]})
    assert slots[0][slots[0] >= 0].tolist() == [7, 1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3}, r"options must be .*got \['start'\]"),
        ({"requests": []}, "non-empty list"),
        ({"requests": [0.5]}, "non-empty list of indices"),
        ({"requests": [[1, 2]]}, "non-empty list"),
        ({"requests": [0, 25]}, r"must be in 0\.\.24, got 0\.\.25"),
        ({"requests": [-1]}, r"must be in 0\.\.24"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().reset(options=options)


def test_a_request_without_decode_rows_cannot_be_asked_for() -> None:
    requests = TRACE.requests
    n_prompt = requests.n_prompt.copy()
    n_prompt[3] = requests.length[3]
    trace = RoutingTrace.from_arrays(
        TRACE.expert_ids, replace(requests, n_prompt=n_prompt), TRACE.metadata
    )
    with pytest.raises(ValueError, match="request 3 has none"):
        make(trace=trace).reset(options={"requests": [2, 3]})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"window": 0}, "window must be >= 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number >= 1, got 2.5"),
        ({"batch_size": "8"}, "batch_size must be a whole number >= 1, got '8'"),
        ({"window": True}, "window must be a whole number >= 1, got True"),
        ({"max_windows": 0}, "max_windows must be >= 1, got 0"),
        ({"max_windows": 1.5}, "max_windows must be a whole number >= 1, got 1.5"),
        ({"hbm_budget": None}, "hbm_budget must be bytes, a share in"),
        ({"hbm_budget": ["a", "b"]}, "two shares 0 < low <= high <= 1"),
        ({"hbm_budget": 1.5}, r"share in \(0, 1\]"),
        ({"hbm_budget": "all"}, "'auto'"),
        ({"hbm_budget": [0.2, 0.1]}, "two shares 0 < low <= high <= 1"),
        ({"split": "dev"}, "split must be one of"),
        ({"scheduling": "eager"}, "scheduling must be 'continuous' or 'static', got 'eager'"),
        ({"action": "free"}, "action must be one of"),
        ({"quality_weight": "best"}, "quality_weight must be one of"),
        ({"quality_weight": -1.0}, "finite and >= 0"),
        ({"render_mode": "human"}, r"render_mode must be None or one of \['ansi'\]"),
        ({"model": "mixtral-8x7b"}, "must agree in n_layers"),
        ({"model": None}, "names no model preset"),
        ({"system": "h1000"}, "unknown system preset"),
    ],
)
def test_a_bad_argument_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_numpy_numbers_are_numbers() -> None:
    numbers = {"batch_size": np.int64(3), "window": np.int32(4), "max_windows": np.int64(2)}
    for budget in (np.float32(0.5), np.float64(0.5), np.int64(2000)):
        make(hbm_budget=budget, **numbers).reset(seed=0)


def test_an_action_of_another_shape_is_refused() -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must have shape \(\d+,\), got \(3,\)"):
        env.step(np.zeros(3))


@pytest.mark.parametrize("weight", ["speed", "balanced", "quality", 2.5])
def test_reward_is_the_weighted_sum_of_the_named_terms(weight: Any) -> None:
    env = make(quality_weight=weight)
    value = {"speed": 1.0, "balanced": 4.0, "quality": 16.0}.get(weight, weight)
    for result in play(env, seed=2):
        if len(result) == 2:
            continue
        _, reward, _, _, info = result
        assert reward == info["reward_throughput"] + value * info["reward_quality"]
        assert info["reward_throughput"] == np.log(info["ref_decode_s"] / info["decode_s"])
        assert info["reward_quality"] == info["ref_delta_nll_nats"] - info["delta_nll_nats"]
        assert info["reward_energy"] == -info["energy_j"] / info["tokens"]
        named = [info[f"reward_{term}"] for term in ("throughput", "quality", "energy")]
        assert info["reward_vector"].tolist() == named


def test_first_tokens_wait_for_prefills_before_theirs_and_the_first_load() -> None:
    env = make(action="placement", hbm_budget=0.5)
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.zeros(8, np.int64))
    assert info["load_s"] > 0
    assert info["admitted"].all()
    assert (np.diff(info["ttft_s"]) > 0).all()
    assert info["ttft_s"][-1] == pytest.approx(info["prefill_s"] + info["load_s"])
    later = [env.step(np.zeros(8, np.int64))[4] for _ in range(8)]
    for info in later:
        assert info["load_s"] == 0
        assert ((info["ttft_s"] > 0) == info["admitted"]).all()
    assert any(info["admitted"].any() for info in later)


def test_a_budget_range_is_drawn_log_uniformly_per_episode() -> None:
    env = make(hbm_budget=[0.03, 0.3])
    share = CONTEXT_NAMES.index("hbm_budget_share")
    shares = []
    for seed in range(200):
        observation, info = env.reset(seed=seed)
        shares.append(float(observation["context"][share]))
        assert info["hbm_budget_bytes"] == pytest.approx(shares[-1] * MODEL.routed_bytes16, abs=1)
    assert 0.0299 < min(shares) < 0.04
    assert 0.25 < max(shares) <= 0.3
    assert np.median(shares) == pytest.approx((0.03 * 0.3) ** 0.5, rel=0.2)


def test_an_automatic_budget_shrinks_as_contexts_grow() -> None:
    env = make(hbm_budget="auto", batch_size=1)
    env.action_space.seed(0)
    budget = CONTEXT_NAMES.index("hbm_budget_bytes")
    kv = MODEL.kv_bytes_per_token_layer * MODEL.n_all_layers
    first = env.reset(options={"requests": [0]})[0]["context"][budget]
    second = env.step(env.action_space.sample())[0]["context"][budget]
    assert first - second == pytest.approx(4 * kv, abs=1)


def test_render_shows_layers_tiers_and_bits() -> None:
    env = make(action="placement", render_mode="ansi", hbm_budget=0.5)
    env.reset(seed=0)
    assert "nothing placed yet" in str(env.render())
    env.step(np.array([0, 4, 5, 6, 7, 7, 7, 7]))
    title, legend, *layers = str(env.render()).splitlines()
    assert title == "window 1, 12 tokens"
    assert "F=HBM 16 bit x1" in legend
    assert layers == ["0 Ffed", "1 bbbb"]


def test_render_without_a_mode_warns() -> None:
    with pytest.warns(UserWarning, match="render_mode='ansi'"):
        assert make().render() is None


def test_defaults_are_the_bundled_recording() -> None:
    env = gym.make(ENV_ID)
    lanes = env.unwrapped.episodes.lanes  # type: ignore[attr-defined]
    assert lanes.model.name == lanes.trace.metadata.preset
    assert lanes.system.name == DEFAULT_SYSTEM
    assert f"`{DEFAULT_SYSTEM}`" in env_docs.page()
    for _ in play(env, seed=0, n_steps=3):
        pass


@pytest.mark.parametrize("action", ENCODINGS)
def test_the_spec_survives_json(action: str) -> None:
    env = gym.make(ENV_ID, action=action, hbm_budget=[0.05, 0.2], max_windows=3)
    assert env.spec is not None
    text = env.spec.to_json()
    again = gym.make(EnvSpec.from_json(text))
    assert again.spec is not None
    assert json.loads(again.spec.to_json()) == json.loads(text)
    assert digest(again) == digest(env)


def test_the_page_is_the_docstring() -> None:
    path = Path(__file__).parent.parent / "docs/env.md"
    assert path.read_text(encoding="utf-8") == env_docs.page(), (
        "python -m ndp_gym.env_docs > docs/env.md"
    )


def test_the_page_has_the_sections_of_a_farama_page_in_order() -> None:
    sections = [line[3:] for line in env_docs.page().splitlines() if line.startswith("## ")]
    assert sections == [
        "Description", "Action Space", "Observation Space", "Rewards", "Starting State",
        "Episode End", "Arguments", "Vectorized environment", "Version History",
    ]  # fmt: skip


def test_the_page_names_every_argument_with_its_default() -> None:
    import inspect

    text = env_docs.page()
    for name, parameter in inspect.signature(NDPPlacementEnv).parameters.items():
        default = parameter.default
        shown = f'"{default}"' if isinstance(default, str) else repr(default).replace("0.1", "0.10")
        assert f"| `{name}` | `{shown}` |" in text
    for name in make().observation_space:
        assert f"| `{name}` |" in text
