"""Policies over drawn conditions: the same episodes for everyone, measured on what really ran."""

from dataclasses import replace

import numpy as np
import pytest

from ndp_gym.condition import Process, Speeds
from ndp_gym.conditions import Conditions, Hidden
from ndp_gym.rollout import Replayed, Task, run_policy
from ndp_gym.scenarios import condition_tasks, run_episodes
from policies.all_far import AllFar
from policies.all_hbm import AllHbm
from policies.balance import Balance
from policies.random import Random
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace(n_conversations=60)
CONDITIONS = Conditions(
    batch_sizes=(1, 3), hbm_budget=(0.1, 0.5), link_bandwidth=(0.5, 2.0), extra_context=(0, 50),
    quality_weights=(1.0, 16.0), mix=0.5, hidden=Hidden(far=(0.4, 1.0)), domain_change=0.5,
)  # fmt: skip


def tasks(n: int = 4, seed: int = 0, conditions: Conditions = CONDITIONS) -> list[Task]:
    return condition_tasks(TRACE, MODEL, SYSTEM, conditions, "test", n, 5, seed, window=4)


def test_episodes_depend_on_seed_and_index_alone() -> None:
    some, more, others = tasks(2), tasks(4), tasks(2, seed=1)
    for one, same, other in zip(some, more, others, strict=False):
        assert one.condition == same.condition != other.condition
        assert one.order is not None
        np.testing.assert_array_equal(one.order, same.order)
    assert len({str(task.condition) for task in more}) == 4
    assert more[0].batch_size == more[0].condition.batch_size  # type: ignore[union-attr]


def test_scores_are_those_of_the_runs_and_all_far_at_4_bit_earns_nothing() -> None:
    found = tasks()
    scores, far = run_episodes(Balance(), found), run_episodes(AllFar(), found)
    assert np.abs(far.reward).max() < 1e-12
    np.testing.assert_allclose(far.speedup, 1.0)
    np.testing.assert_array_equal(scores.tokens, far.tokens)
    np.testing.assert_array_equal(scores.ref_decode_s, far.ref_decode_s)
    for i, task in enumerate(found):
        run = run_policy(Balance(), task, seed=0)
        throughput, quality = (np.mean(run.terms[name]) for name in ("throughput", "quality"))
        assert scores.reward[i] == pytest.approx(throughput + task.quality_weight * quality)
        assert scores.tokens_per_s[i] == run.totals["tokens"] / run.totals["decode_s"]
        assert scores.delta_nll[i] == pytest.approx(run.loss.sum() / run.tokens.sum())


def test_what_draws_random_numbers_draws_the_same_again() -> None:
    found = tasks(2)
    one, same, other = (run_episodes(Random(), found, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.reward, same.reward)
    assert (one.reward != other.reward).all()


def test_who_has_no_plan_scores_nan_there_and_only_there() -> None:
    budgets = Conditions(hbm_budget=(0.05, 0.9))
    reward = run_episodes(AllHbm(), tasks(8, conditions=budgets)).reward
    assert 0 < np.isnan(reward).sum() < 8


def test_a_slower_machine_is_felt_and_a_throttled_one_while_it_lasts() -> None:
    task = tasks(1, conditions=Conditions())[0]
    assert task.condition is not None
    slow = replace(task.condition, speeds=Speeds(far=0.5))
    late = replace(
        task.condition, processes=(Process(kind="far_throttle", onset=2, length=2, factor=0.5),)
    )
    windows: list[Replayed] = []
    watches = None, windows.append
    far = [
        run_policy(AllFar(), task.under(c, task.order), seed=0, watch=watch)
        for c, watch in zip((slow, late), watches, strict=True)
    ]
    calm = run_policy(AllFar(), task, seed=0)
    assert far[0].totals["far_busy_s"] == pytest.approx(2 * calm.totals["far_busy_s"])
    assert [window.system for window in windows] == [late.actual_at(w) for w in range(5)]
    with pytest.raises(ValueError, match=r"Task\.under"):
        run_policy(AllFar(), replace(task, system=windows[2].system), seed=0)
    share = far[1].totals["far_busy_s"] / calm.totals["far_busy_s"]
    assert share == pytest.approx(1.4, abs=0.1)  # two of five windows


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="n_episodes must be a whole number >= 1, got 0"):
        tasks(0)
    with pytest.raises(ValueError, match="conditions must be one of"):
        condition_tasks(TRACE, MODEL, SYSTEM, "storm")
