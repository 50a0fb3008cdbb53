"""Imitation: labels match the teacher's amounts, equal seeds agree, and PPO goes on from there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO

from ndp_gym.agent_file import load_agent
from ndp_gym.plan import HBM
from ndp_gym.rollout import run_policy
from policies.agent import LayerAgent
from policies.oracle_balance import OracleBalance
from policies.tuned import read_tuning
from train import ppo
from train.forecast import fit_weights
from train.imitate import GRID, Args, OracleLesson, imitate, missed
from train.setting import episodes_of

TINY: dict[str, Any] = {
    "n_rounds": 2, "n_windows": 4, "episode_windows": 4, "n_epochs": 2, "hidden": 8,
    "conditions": "rand", "val_episodes": 2,
}  # fmt: skip


def test_plans_are_told_apart_by_how_much_is_in_hbm_and_at_which_width() -> None:
    load = np.array([[3.0, 1.0, 0.0, 0.0]])
    wanted = np.array([[0, 1, 1, 1]]), np.array([[4, 4, 4, 4]])
    plans = (
        np.array([[[0, 1, 1, 1]], [[1, 0, 1, 1]], [[0, 1, 0, 0]], [[1, 1, 1, 1]]]),
        np.array([[[4, 4, 1, 1]], [[4, 4, 4, 4]], [[4, 2, 4, 4]], [[2, 2, 4, 4]]]),
    )
    # only loaded experts count; of 4 tokens 3 use the first; 4 -> 2 bits is an octave
    np.testing.assert_allclose(missed(load, plans, wanted)[:, 0], [0, 0.5, 0.25, 1.75])


def test_the_teacher_acts_first_and_labels_lie_within_the_grid() -> None:
    (task,) = episodes_of(Args(**TINY), "train", 1, 0)
    lesson = OracleLesson()
    by_lesson = run_policy(lesson, task, seed=0).terms
    assert by_lesson == run_policy(OracleBalance(), task, seed=0).terms
    labels = np.array(lesson.labels)
    assert labels.shape == (4, task.model.n_layers, 4)
    assert np.abs(labels).max() <= max(GRID)
    assert labels[..., :2].std() > 0.05
    assert (labels[..., 2:] == 0).all()


def test_the_agent_acts_where_there_is_one(tmp_path: Path) -> None:
    agent = load_agent(imitate(Args(out=str(tmp_path), base="balance_feedback_rand", **TINY)))
    assert agent.base == read_tuning("balance_feedback_rand")[1]["constants"]
    np.testing.assert_array_equal(agent.forecast, fit_weights((None,), 16))
    (task,) = episodes_of(Args(**TINY), "train", 1, 0)
    plans: list[Any] = []
    run_policy(OracleLesson(agent, agent.base, agent.forecast), task, seed=0, watch=plans.append)
    own: list[Any] = []
    run_policy(LayerAgent(str(tmp_path / "best")), task, seed=0, watch=own.append)
    for one, other in zip(plans, own, strict=True):
        np.testing.assert_array_equal(one.plan.placement.tier, other.plan.placement.tier)
        np.testing.assert_array_equal(one.plan.placement.bitwidth, other.plan.placement.bitwidth)
    assert (own[0].plan.placement.tier == HBM).any()


def test_equal_seeds_teach_equal_agents_and_ppo_starts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.imitate.fit_weights", lambda *args: None)
    one, other = (imitate(Args(out=str(tmp_path / name), **TINY)) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    args = ppo.Args(hidden=8, n_lanes=2, n_steps=8, minibatch=64)
    env = ppo.environment(args, {}, None)
    model = PPO("MlpPolicy", env, policy_kwargs={"net_arch": [8, 8]}, device="cpu")
    agent = load_agent(one)
    ppo.take_over(model, agent)
    features = env.reset()
    np.testing.assert_allclose(
        model.predict(features, deterministic=True)[0], agent(features).clip(-1, 1), atol=1e-5
    )
    wide = PPO("MlpPolicy", env, policy_kwargs={"net_arch": [16, 16]}, device="cpu")
    with pytest.raises(ValueError, match="init must have the features and sizes"):
        ppo.take_over(wide, agent)
