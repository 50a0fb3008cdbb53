"""Conditions: what episodes draw, what happens on the way, and who is told what."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ndp_gym import presets
from ndp_gym.condition import Condition, Process, Speeds
from ndp_gym.conditions import CONDITIONS, Conditions, Disturbance, Hidden, find_conditions
from ndp_gym.lanes import Lanes
from ndp_gym.policy import CONTEXT_NAMES
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace()
BASE = Condition(system=SYSTEM, batch_size=3, hbm_budget=0.3, quality_weight=4.0)
ORDER = TRACE.split_requests("train")


def drawn(conditions: Conditions, n: int = 300) -> list[Condition]:
    return [conditions.draw(np.random.default_rng(i), BASE) for i in range(n)]


def test_fix_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert CONDITIONS["fix"].draw(rng, BASE) == BASE
    assert rng.bit_generator.state == before
    assert BASE.actual_at(7) is SYSTEM
    assert BASE.changes == ()


def test_rand_covers_its_ranges_and_hides_nothing() -> None:
    found = drawn(CONDITIONS["rand"])
    assert {c.batch_size for c in found} == {1, 2, 4, 8, 16}
    assert {c.quality_weight for c in found} == {1.0, 4.0, 16.0}
    link = np.array([c.system.link.bandwidth_bytes_per_s for c in found]) / 1e6
    far = np.array([c.system.far.bandwidth_bytes_per_s for c in found]) / 6e6
    shares = np.array([c.hbm_budget for c in found], np.float64)
    context = np.array([c.extra_context for c in found])
    for values, low, high in (
        (link, 0.48, 2.0), (far, 0.25 / 0.512, 1 / 0.512), (shares, 0.03, 0.2),
        (1.0 + context, 1.0, 4097.0),
    ):  # fmt: skip
        assert low <= values.min() < low * 1.1
        assert high * 0.9 < values.max() <= high
        assert np.median(values) == pytest.approx(
            (low * high) ** 0.5, rel=0.25 * np.log(high / low)
        )
    for condition in found:
        assert condition.actual_at(0) is condition.system
        assert condition.system.gpu == SYSTEM.gpu
        assert condition.changes == ()


def test_hidden_speeds_are_constant_and_below_nominal() -> None:
    found = drawn(CONDITIONS["hidden"])
    speeds = np.array([c.speeds for c in found])
    assert (speeds.min(0) > 0.4).all()
    assert (speeds.min(0) < 0.42).all()
    assert (speeds.max(0) > 0.98).all()
    one = found[0]
    actual = one.actual_at(0)
    assert actual is one.actual_at(50)
    gpu, far, link = one.speeds
    assert actual.gpu.bandwidth_bytes_per_s == 8e6 * gpu
    assert actual.gpu.flops_per_s == SYSTEM.gpu.flops_per_s * gpu
    assert actual.far.flops_per_s == one.system.far.flops_per_s * far
    assert actual.link.bandwidth_bytes_per_s == one.system.link.bandwidth_bytes_per_s * link
    assert actual.link.latency_s == SYSTEM.link.latency_s


def test_a_ramp_goes_down_in_four_steps_and_comes_back() -> None:
    step = Process(kind="co_tenant", onset=2, length=3, factor=0.5)
    assert [step.level(w) for w in range(6)] == [1, 1, 0.5, 0.5, 0.5, 1]
    ramp = Process(kind="gpu_throttle", onset=1, length=9, ramp=3, factor=0.2)
    levels = [ramp.level(w) for w in range(11)]
    assert levels == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1])
    slow = Process(kind="gpu_throttle", onset=0, length=100, ramp=40, factor=0.2)
    assert len({slow.level(w) for w in range(100)}) == 4


def test_processes_add_up_and_changes_name_every_window_that_differs() -> None:
    condition = replace(
        BASE,
        speeds=Speeds(0.5, 1.0, 1.0),
        processes=(
            Process(kind="gpu_throttle", onset=2, length=2, factor=0.5),
            Process(kind="link_contention", onset=3, length=4, factor=0.25),
            Process(kind="co_tenant", onset=0, length=1, factor=0.5),
        ),
    )
    states = [(*condition.speeds_at(w), condition.budget_factor_at(w)) for w in range(9)]
    assert states[0] == (0.5, 1.0, 1.0, 0.5)
    assert states[3] == (0.25, 1.0, 0.25, 1.0)
    assert states[8] == (0.5, 1.0, 1.0, 1.0)
    differ = tuple(w for w in range(1, 9) if states[w] != states[w - 1])
    assert condition.changes == differ == (1, 2, 3, 4, 7)
    assert condition.actual_at(2).gpu.bandwidth_bytes_per_s == 2e6


def test_drift_disturbs_half_of_the_episodes_each_way() -> None:
    found = drawn(CONDITIONS["drift"])
    for kind in ("gpu_throttle", "far_throttle", "link_contention", "co_tenant"):
        mine = [p for c in found for p in c.processes if p.kind == kind]
        assert 0.4 < len(mine) / len(found) < 0.6
        assert {p.onset for p in mine} <= set(range(4, 33))
        assert min(p.factor for p in mine) < 0.45
    assert 0.4 < np.mean([c.domain_change for c in found]) < 0.6
    assert all(c.actual_at(0) is c.system for c in found)
    assert any(c.actual_at(20) is not c.system for c in found)


def test_no_machine_is_slower_than_the_slowest_or_wider_than_the_widest() -> None:
    for conditions in CONDITIONS.values():
        slowest, widest = conditions.slowest(BASE), conditions.widest(BASE)
        for c in drawn(conditions, 100):
            for window in (0, 10, 20, 30):
                actual = c.actual_at(window)
                assert actual.gpu.bandwidth_bytes_per_s >= slowest.gpu.bandwidth_bytes_per_s
                assert actual.far.flops_per_s >= slowest.far.flops_per_s
                assert actual.link.bandwidth_bytes_per_s >= slowest.link.bandwidth_bytes_per_s
            assert c.batch_size <= widest.batch_size
            assert c.extra_context <= widest.extra_context
            assert c.system.far.bandwidth_bytes_per_s <= widest.system.far.bandwidth_bytes_per_s


def test_domains_come_in_blocks_or_by_weight() -> None:
    domain = TRACE.requests.domain
    blocks = Conditions(domain_change=1.0)
    mixed = Conditions(mix=0.1)
    early = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        order, condition = blocks.draw_episode(rng, BASE, ORDER, domain)
        assert condition.domain_change
        assert sorted(order) == sorted(ORDER)
        assert (np.diff(domain[order]) != 0).sum() == 1
        order, _ = mixed.draw_episode(rng, BASE, ORDER, domain)
        assert sorted(order) == sorted(ORDER)
        early.append(domain[order[:4]].mean())
    assert np.mean(np.array(early) % 1 == 0) > 0.5  # mostly one domain; by chance 1 in 8


def test_a_lane_shows_what_is_told_and_runs_on_what_is_not() -> None:
    lanes = Lanes(TRACE, MODEL, SYSTEM, n_lanes=2, batch_size=3, window=4, hbm_budget=0.3)
    slower = replace(BASE, speeds=Speeds(0.5, 0.5, 0.5))
    told = replace(
        BASE, batch_size=2, extra_context=100, quality_weight=1.0, hbm_budget=0.1,
        system=replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=2e6)),
    )  # fmt: skip
    lanes.reset(0, ORDER, slower)
    lanes.reset(1, ORDER, told)
    one, two = lanes.observe()["context"]
    facts = dict(zip(CONTEXT_NAMES, two.tolist(), strict=True))
    assert one[CONTEXT_NAMES.index("link_bytes_per_s")] == 1e6
    assert (facts["batch_size"], facts["n_live"], facts["link_bytes_per_s"]) == (2, 2, 2e6)
    assert facts["quality_weight"] == 1
    assert facts["hbm_budget_share"] == pytest.approx(0.1, abs=1e-4)
    recorded = TRACE.requests.n_prompt + TRACE.requests.context_offset
    assert facts["mean_context"] == 100 + recorded[ORDER[:2]].mean()
    shape = (2, 2, 4)
    fast = Lanes(TRACE, MODEL, SYSTEM, n_lanes=2, batch_size=3, window=4, hbm_budget=0.3)
    fast.reset(0, ORDER)
    fast.reset(1, ORDER)
    plan = np.ones(shape, np.uint8), np.full(shape, 4, np.uint8)
    slow_s, fast_s = lanes.advance(*plan), fast.advance(*plan)
    np.testing.assert_allclose(slow_s.far_s[0], 2 * fast_s.far_s[0])
    seconds = [one.observe()["layer"][0, :, 1] for one in (lanes, fast)]
    np.testing.assert_allclose(seconds[0], 2 * seconds[1], rtol=1e-6)


def test_a_machine_changes_under_a_running_episode_and_its_state_stays() -> None:
    lanes = Lanes(TRACE, MODEL, SYSTEM, batch_size=3, window=4, hbm_budget=0.5)
    calm = Lanes(TRACE, MODEL, SYSTEM, batch_size=3, window=4, hbm_budget=0.5)
    processes = (
        Process(kind="gpu_throttle", onset=1, length=1, factor=0.5),
        Process(kind="co_tenant", onset=2, length=1, factor=0.5),
    )
    lanes.reset(0, ORDER, replace(lanes.base, processes=processes))
    calm.reset(0, ORDER)
    plan = np.zeros((1, 2, 4), np.uint8), np.full((1, 2, 4), 8, np.uint8)  # fills the budget
    budget = CONTEXT_NAMES.index("hbm_budget_bytes")
    for window in range(4):
        ours, theirs = lanes.observe()["context"][0], calm.observe()["context"][0]
        assert ours[budget] == theirs[budget] // (2 if window == 2 else 1)
        one, other = lanes.advance(*plan), calm.advance(*plan)
        np.testing.assert_array_equal(one.counts, other.counts)
        if window == 0:
            assert one.decode_s == other.decode_s
        elif window == 1:
            launch = 0.1e-3 * 4  # one per step, which is not throttled
            np.testing.assert_allclose(one.gpu_s - launch, 2 * (other.gpu_s - launch))
        assert (one.n_repaired > 0) == (window == 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conditions(batch_sizes=(0,)), "batch_sizes must be >= 1, got 0"),
        (lambda: Conditions(hbm_budget=(0.2, 0.1)), "hbm_budget must be two numbers 0 < low"),
        (lambda: Conditions(hbm_budget=(0.2, 1.1)), "hbm_budget .* high <= 1, got"),
        (lambda: Conditions(far_compute=(0.0, 1.0)), "far_compute must be two numbers"),
        (lambda: Conditions(extra_context=(5, 1)), "extra_context must be two whole numbers"),
        (lambda: Conditions(quality_weights=(-1.0,)), "quality_weights must be finite and >= 0"),
        (lambda: Conditions(domain_change=2.0), r"domain_change must be in 0\.\.1, got 2"),
        (lambda: Hidden(gpu=(0.4, 1.2)), "hidden gpu must be two numbers 0 < low <= high <= 1"),
        (lambda: Disturbance(kind="flood", factor=(0.5, 1.0)), "drift kind must be one of"),  # type: ignore[arg-type]
        (lambda: find_conditions("calm"), "conditions must be one of .*got 'calm'"),
    ],
)
def test_what_makes_no_sense_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_lanes_have_room_for_all_or_say_so() -> None:
    with pytest.raises(ValueError, match="must fit in HBM"):
        Lanes(TRACE, MODEL, SYSTEM, conditions=Conditions(extra_context=(0, 10**6)))
    lanes = Lanes(TRACE, MODEL, SYSTEM, conditions=Conditions(batch_sizes=(2, 5)))
    assert lanes.batch_size == 5
    with pytest.raises(ValueError, match="batch_size <= 5 slots, got 6"):
        lanes.reset(0, ORDER, replace(lanes.base, batch_size=6))
    other = presets.system("h100_cxl_seed_ndp")
    with pytest.raises(ValueError, match="stored_bits"):
        lanes.reset(0, ORDER, replace(lanes.base, batch_size=2, system=other))
