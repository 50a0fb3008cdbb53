"""`balance_feedback` learns what the machine really takes, and is `balance` where it need not."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from ndp_gym import speed_loops
from ndp_gym.cost import cost_table
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.layer_facts import LaneFacts
from ndp_gym.planners import facts_of
from ndp_gym.quality import QualityModel
from ndp_gym.rollout import Task, run_policy, train_profile
from ndp_gym.speeds import costs_of
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM


class Run(NamedTuple):
    """Rewards of every window of a run and the factors learnt until its end."""

    rewards: np.ndarray
    factors: np.ndarray


@cache
def bundled() -> Task:
    trace = open_trace(None)
    return Task(
        trace=trace, model=find_model(None, trace), system=find_system(None), batch_size=8,
        window=16, hbm_budget=0.1, split="val", scheduling="continuous", quality=QualityModel(),
        quality_weight=4.0, max_windows=None, profile=train_profile(trace),
    )  # fmt: skip


@cache
def run(*, feedback: bool, far: float = 1.0, link: float = 1.0, gain: float = 0.3) -> Run:
    """One pass over val where far device and link run at a share of their nominal speed."""
    task = bundled()
    nominal = task.system
    actual = replace(
        nominal,
        far=replace(
            nominal.far,
            bandwidth_bytes_per_s=far * nominal.far.bandwidth_bytes_per_s,
            flops_per_s=far * nominal.far.flops_per_s,
        ),
        link=replace(nominal.link, bandwidth_bytes_per_s=link * nominal.link.bandwidth_bytes_per_s),
    )
    policy = BalanceFeedback(gain) if feedback else Balance()
    terms = run_policy(policy, replace(task, actual=actual), seed=0).terms
    rewards = np.array(terms["throughput"]) + task.quality_weight * np.array(terms["quality"])
    return Run(
        rewards, policy.speeds.factors[0] if isinstance(policy, BalanceFeedback) else np.ones(3)
    )


@pytest.mark.parametrize("far", [0.5, 0.25, 2.0])
def test_a_far_device_of_another_speed_is_learnt_and_pays(far: float) -> None:
    plain, fed = run(feedback=False, far=far), run(feedback=True, far=far)
    assert fed.factors[1] == pytest.approx(1 / far, rel=0.05)
    gain = fed.rewards - plain.rewards
    assert gain.mean() > 0.001
    assert gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5


def test_a_contended_link_is_learnt() -> None:
    assert run(feedback=True, link=0.4).factors[2] == pytest.approx(2.5, rel=0.05)


def test_it_is_nearly_balance_where_the_machine_is_as_told() -> None:
    plain, fed = run(feedback=False), run(feedback=True)
    assert abs(fed.rewards.mean() - plain.rewards.mean()) < 0.003
    np.testing.assert_allclose(fed.factors, 1, atol=0.15)


def test_without_gain_it_is_balance() -> None:
    plain, fed = run(feedback=False, far=0.5), run(feedback=True, far=0.5, gain=0.0)
    np.testing.assert_array_equal(fed.rewards, plain.rewards)


@pytest.mark.parametrize("gain", [-0.1, 1.5])
def test_a_gain_outside_0_to_1_is_refused(gain: float) -> None:
    with pytest.raises(ValueError, match=rf"gain must be in 0\.\.1, got {gain}"):
        BalanceFeedback(gain)


def seconds_of(
    load: np.ndarray, hbm: np.ndarray, far: np.ndarray, far_computes: bool, fetched_s: float = 0.0
) -> np.ndarray:
    """What the compiled loop says of one lane: GPU, far, link, launches, latency."""
    facts = facts_of(MODEL, SYSTEM, QualityModel(), 4.0, 16)
    found = np.zeros((1, 5))
    copies = hbm[None], far[None]
    speed_loops.nominal_seconds(
        load[None], (copies, copies), costs_of(LaneFacts(facts, 1)), float(MODEL.top_k),
        float(facts.table.far_min_tokens), far_computes, np.array([fetched_s]), found,
    )  # fmt: skip
    return found[0] / 2


def test_nominal_seconds_are_those_of_the_cost_table() -> None:
    table, shape = cost_table(MODEL, SYSTEM), (MODEL.n_layers, MODEL.n_experts)
    load = np.zeros(shape)
    load[:, : MODEL.top_k] = 1.0  # one token, which uses the first K experts of every layer
    none, four = np.zeros(shape, np.int64), np.full(shape, 4)
    index, n_used = int(table.index_of[4]), MODEL.n_layers * MODEL.top_k
    gpu, far, link, launch, latency = seconds_of(load, none, four, True)
    one_s = max(table.far_weight_s[index], table.far_min_tokens * table.far_token_s[index])
    assert far == pytest.approx(n_used * one_s)
    assert link == pytest.approx(MODEL.n_layers * table.activation_token_s)
    link_alone = link
    assert latency == pytest.approx(2 * MODEL.n_layers * table.link_latency_s)
    assert gpu == launch == 0
    gpu, far, link, launch, latency = seconds_of(load, four, four, True)
    weights_s = MODEL.top_k * table.gpu_weight_s[index]
    tokens_s = MODEL.top_k * table.gpu_token_s
    assert gpu == pytest.approx(MODEL.n_layers * max(weights_s, tokens_s))
    assert launch == pytest.approx(MODEL.n_layers * table.gpu_launch_s[index])
    assert far == link == latency == 0
    all_s = n_used * table.copy_s[index]
    fetched = seconds_of(load, none, four, False, all_s)
    assert fetched[speed_loops.LINK] == pytest.approx(all_s)
    assert fetched[speed_loops.GPU] == pytest.approx(gpu)
    half = seconds_of(load, none, four, True, all_s / 2)
    assert half[speed_loops.FAR] == pytest.approx(n_used * one_s / 2)
    assert half[speed_loops.GPU] == pytest.approx(MODEL.n_layers * weights_s / 2)
    any_moves = min(1, MODEL.top_k / 2)  # a launch per layer, and no more
    assert half[speed_loops.LAUNCH] == pytest.approx(any_moves * launch)
    assert half[speed_loops.LINK] == pytest.approx(link_alone + all_s / 2)


def test_copies_of_a_machine_that_only_stores_are_timed_too() -> None:
    trace = make_trace(n_conversations=60)
    system = replace(SYSTEM, far=replace(SYSTEM.far, can_compute=False))
    slow = replace(
        system,
        link=replace(system.link, bandwidth_bytes_per_s=system.link.bandwidth_bytes_per_s / 4),
    )
    task = replace(
        bundled(), trace=trace, model=MODEL, system=system, actual=slow, split="test", profile=None,
        batch_size=3, window=4, hbm_budget=0.02,
    )  # fmt: skip
    policy = BalanceFeedback()
    run_policy(policy, task, seed=0)
    assert policy.speeds.factors[0, 2] == pytest.approx(4, rel=0.25)
