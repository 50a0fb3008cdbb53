"""Every policy's defining property, on observations made by hand."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ndp_gym import lanes, presets
from ndp_gym.bit_ladder import bit_ladder
from ndp_gym.cost import expert_bytes
from ndp_gym.plan import FAR, HBM, check_plan
from ndp_gym.policy import (
    CONTEXT_NAMES,
    InfeasibleError,
    MissingProfileError,
    PolicyContext,
    context_entry,
    needs_future,
    resolve,
)
from policies import POLICIES

MODEL = replace(
    presets.model("deepseek-v2-lite"),
    n_layers=3,
    n_experts=16,
    top_k=2,
    layer_weights=None,
    gate_profile=None,
)
SYSTEM = presets.system("h100_seed_ndp")
BUDGET = int(0.10 * MODEL.routed_bytes16)
SHAPE = (MODEL.n_layers, MODEL.n_experts)
FITS = sorted(set(POLICIES) - {"all_hbm", "all_hbm_mixed"})


def random_load(seed=0, skew=1.0):
    """[L, E] tokens per decode step of four live requests."""
    weight = np.random.default_rng(seed).gamma(1 / skew, size=SHAPE) + 1e-3
    return 4 * MODEL.top_k * weight / weight.sum(axis=1, keepdims=True)


def observe(load, *, plan=None, budget=BUDGET, n_admitted=0, prefill=None, n_live=4):
    """What a policy sees after windows of constant ``load``, all of ``plan`` in place."""
    entries = {
        "hbm_budget_bytes": budget,
        "n_live": n_live,
        "n_admitted": n_admitted,
        "mean_context": 500,
        "batch_size": 4,
        "window": 16,
        "quality_weight": 4,
    }
    tier = np.ones(SHAPE) if plan is None else plan.placement.tier
    bits = np.zeros(SHAPE) if plan is None else plan.placement.bitwidth
    arrays = {
        "prefill_load": load if prefill is None else prefill,
        "last_load": load,
        "ema_load": load,
        "gate_share": load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9),
        "tier": tier,
        "bitwidth": bits,
        "in_flight": np.zeros(SHAPE),
        "layer": np.zeros((SHAPE[0], 5)),
        "context": np.array([entries.get(name, 0.0) for name in CONTEXT_NAMES]),
    }
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def started(name, *, system=SYSTEM, model=MODEL, future=None, profile=None, budget=BUDGET, seed=0):
    policy = resolve(name)() if isinstance(name, str) else name
    policy.reset(
        PolicyContext(
            model=model,
            system=system,
            batch_size=4,
            window=16,
            hbm_budget_bytes=budget,
            rng=np.random.default_rng(seed),
            profile=random_load(99) if profile is None else profile,
            future=future or known_future(random_load(7)),
        )
    )
    return policy


def known_future(load):
    counts = np.random.default_rng(0).poisson(np.broadcast_to(load, (16, *SHAPE)))
    return SimpleNamespace(total_load=load, next_counts=lambda: counts)


def charged_bytes(plan, before=None, model=MODEL, system=SYSTEM):
    """HBM bytes as `transition` charges them: a changing copy counts at the larger width."""
    total = 0
    for at in map(tuple, np.argwhere(plan.placement.tier == HBM)):
        sizes = [expert_bytes(model, system.format, int(plan.placement.bitwidth[at]))]
        if before is not None and before.placement.tier[at] == HBM:
            sizes.append(expert_bytes(model, system.format, int(before.placement.bitwidth[at])))
        total += max(sizes)
    return total


def hot_count(plan):
    return int((plan.placement.tier == HBM).sum())


def same_hbm(a, b):
    def copies(plan):
        return np.where(plan.placement.tier == HBM, plan.placement.bitwidth, 0)

    return np.array_equal(copies(a), copies(b))


@pytest.mark.parametrize("name", FITS)
def test_plans_of_random_observations_are_valid_and_within_budget(name):
    policy, before = started(name), None
    for seed in range(4):
        load = random_load(seed)
        budget = BUDGET - 1000 * seed
        plan = policy(observe(load, plan=before, budget=budget, n_admitted=seed % 2))
        check_plan(plan, MODEL, SYSTEM)
        if name != "context_aware" or seed % 2:
            assert charged_bytes(plan, before) <= budget
        before = plan


@pytest.mark.parametrize("name", FITS)
def test_a_second_episode_does_not_remember_the_first(name):
    fresh, used = started(name), started(name)
    used(observe(random_load(3)))
    used.reset(
        PolicyContext(
            model=MODEL, system=SYSTEM, batch_size=4, window=16, hbm_budget_bytes=BUDGET,
            profile=random_load(99), future=known_future(random_load(7)),
        )
    )  # fmt: skip
    a, b = (p(observe(random_load(1), n_admitted=1)).placement for p in (fresh, used))
    assert np.array_equal(a.tier, b.tier)
    assert np.array_equal(a.bitwidth, b.bitwidth)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("all_far", 4),
        ("all_far3", 3),
        ("all_far2", 2),
        ("all_far:bits=8", 8),
    ],
)
def test_all_far_serves_every_expert_at_the_width_of_its_option(name, width):
    placement = started(name)(observe(random_load())).placement
    assert (placement.tier == FAR).all()
    assert (placement.bitwidth == width).all()


def test_all_far_changes_no_width_silently():
    with pytest.raises(InfeasibleError, match="7 bit is not stored by"):
        started("all_far:bits=7")


def test_all_hbm_takes_the_largest_uniform_width_and_says_where_none_fits():
    everything = MODEL.n_layers * MODEL.n_experts
    budget = everything * expert_bytes(MODEL, SYSTEM.format, 3)
    policy = started("all_hbm", budget=budget)
    assert (policy(observe(random_load(), budget=budget + 10**6)).placement.bitwidth == 3).all()
    with pytest.raises(InfeasibleError, match="no uniform stored width"):
        started("all_hbm")
    with pytest.raises(InfeasibleError, match="narrowest"):
        started("all_hbm_mixed")


def test_all_hbm_mixed_gives_the_busiest_experts_more_bits():
    budget = int(MODEL.n_layers * MODEL.n_experts * 1.4 * expert_bytes(MODEL, SYSTEM.format, 3))
    load = random_load()
    policy = started("all_hbm_mixed", budget=budget, profile=load)
    plan = policy(observe(load, budget=budget))
    assert policy(observe(random_load(1), budget=budget, n_admitted=4)) is plan
    bits = plan.placement.bitwidth
    assert (plan.placement.tier == HBM).all()
    assert bits[load > np.quantile(load, 0.9)].min() >= bits[load < np.quantile(load, 0.1)].max()
    assert charged_bytes(plan) <= budget


@pytest.mark.parametrize("rule", ["lru", "lfu"])
def test_caches_pin_nothing_and_fetch_with_their_rule(rule):
    plan = started(f"{rule}:bits=3,scope=global")(observe(random_load()))
    assert (plan.placement.tier == FAR).all()
    assert (plan.placement.bitwidth == 3).all()
    assert plan.service is not None
    assert (plan.service.kind, plan.service.cache, plan.service.scope) == ("fetch", rule, "global")


def test_static_popularity_pins_the_top_of_the_train_profile_whatever_happens_now():
    profile = random_load(5)
    policy = started("static_popularity", profile=profile)
    hot = policy(observe(random_load(1))).placement.tier == HBM
    assert profile[hot].min() >= profile[~hot].max()
    assert same_hbm(policy(observe(random_load(1))), policy(observe(random_load(2))))


def test_static_popularity_needs_a_train_profile():
    policy = resolve("static_popularity")()
    context = PolicyContext(model=MODEL, system=SYSTEM, batch_size=1, window=16, hbm_budget_bytes=1)
    with pytest.raises(MissingProfileError, match="no train split"):
        policy.reset(context)


def test_prefill_topk_pins_equally_many_per_layer_and_only_admissions_change_them():
    policy = started("prefill_topk")
    first = policy(observe(random_load(0), n_admitted=4))
    counts = (first.placement.tier == HBM).sum(axis=1)
    assert len(set(counts)) == 1
    assert counts[0] > 0
    assert same_hbm(first, policy(observe(random_load(1))))
    assert not same_hbm(first, policy(observe(random_load(1), n_admitted=1)))


def test_ema_follows_the_average_and_starts_from_prefill():
    policy, prompt, decode = started("ema"), random_load(0), random_load(1)
    first = observe(np.zeros(SHAPE), prefill=prompt)
    assert prompt[policy(first).placement.tier == HBM].min() >= np.median(prompt)
    hot = policy(observe(decode, prefill=prompt)).placement.tier == HBM
    assert decode[hot].min() >= decode[~hot].max()


def test_random_is_drawn_from_the_seed_of_the_run_and_kept():
    a, b, other = (started("random", seed=seed) for seed in (1, 1, 2))
    plan = a(observe(random_load()))
    assert same_hbm(plan, b(observe(random_load(3))))
    assert same_hbm(plan, a(observe(random_load(4))))
    assert not same_hbm(plan, other(observe(random_load())))
    redrawn = started("random:redraw=True")
    assert not same_hbm(redrawn(observe(random_load())), redrawn(observe(random_load())))


def test_oracles_are_marked_and_use_the_future():
    load = random_load(7)
    assert {n for n in POLICIES if needs_future(resolve(n))} == {
        "expertflow_cache",
        "hindsight_static",
        "oracle_hot",
        "oracle_balance",
    }
    static = started("hindsight_static", future=known_future(load))
    hot = static(observe(random_load(1))).placement.tier == HBM
    assert load[hot].min() >= load[~hot].max()
    counts = known_future(load).next_counts().sum(axis=0)
    hot = started("oracle_hot", future=known_future(load))(observe(random_load(1)))
    assert counts[hot.placement.tier == HBM].min() >= counts[hot.placement.tier == FAR].max()
    with pytest.raises(ValueError, match="future"):
        resolve("oracle_hot")().reset(
            PolicyContext(model=MODEL, system=SYSTEM, batch_size=1, window=16, hbm_budget_bytes=1)
        )


def test_context_entries_are_read_by_name():
    assert lanes.CONTEXT_NAMES == CONTEXT_NAMES
    assert context_entry(observe(random_load(), n_admitted=3), "n_admitted") == 3


# The seed paper's bit search


def brute_force_gain(loss, menu, average):
    """Most loss avoided by any widths that never rise along the ranking and spend the total."""
    n = len(loss)
    total = int(n * average)
    best = -np.inf
    for widths in itertools.product(range(len(menu)), repeat=n):
        if list(widths) == sorted(widths) and sum(menu[list(widths)]) == total:
            best = max(best, sum(loss[i, -1] - loss[i, w] for i, w in enumerate(widths)))
    return best


@pytest.mark.parametrize("n_experts", [1, 4, 6])
@pytest.mark.parametrize("average", [2, 3])
def test_bit_ladder_finds_what_brute_force_finds(n_experts, average):
    menu = np.array([4, 3, 2, 1])
    rng = np.random.default_rng(n_experts)
    for _ in range(20):
        loss = np.sort(rng.random((n_experts, 4)), axis=1)
        bits = bit_ladder(loss[None], menu, average)[0]
        assert bits.sum() == n_experts * average
        assert (np.diff(bits) <= 0).all()
        gain = sum(loss[i, -1] - loss[i, list(menu).index(b)] for i, b in enumerate(bits))
        assert gain == pytest.approx(brute_force_gain(loss, menu, average))


def test_bit_ladder_of_four_experts_and_eight_increments():
    # E = 4, average 3, so R = 4 * (3 - 1) = 8 increments. Avoided losses: D(4) = 12 for the first
    # expert and 3 for the others, D(3) = 2 and D(2) = 1 for all.
    loss = np.array([[0, 10, 11, 12], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]], dtype=float)
    bits = bit_ladder(loss[None], np.array([4, 3, 2, 1]), 3)[0]
    # 3,3,3,3 avoids 8; every ladder that starts with 4 avoids 12 + 5, and the first in the paper's
    # order is n4 = 1, n3 = 2, n2 = 1 (n3 <= 1 would need more than four experts).
    assert list(bits) == [4, 3, 3, 2]
    # Where a 4th bit helps nobody, everybody gets 3.
    flat = np.array([[0, 0, 1, 2]] * 4, dtype=float)
    assert list(bit_ladder(flat[None], np.array([4, 3, 2, 1]), 3)[0]) == [3, 3, 3, 3]


def test_bit_ladder_copes_with_menus_that_skip_widths():
    loss = np.sort(np.random.default_rng(0).random((1, 5, 2)), axis=2)
    assert list(bit_ladder(loss, np.array([4, 2]), 3)[0]) == [4, 4, 2, 2, 2]
    assert list(bit_ladder(loss[..., :1], np.array([4]), 3)[0]) == [4] * 5
    assert list(bit_ladder(loss, np.array([4, 2]), 1)[0]) == [2] * 5
    assert list(bit_ladder(loss, np.array([4, 2]), 9)[0]) == [4] * 5


def test_context_aware_pins_the_most_important_and_orders_bits_by_importance():
    seed_sim = presets.system("seed_sim")
    load = random_load(2)
    policy = started("context_aware", system=seed_sim)
    plan = policy(observe(load, n_admitted=4))
    # 10 % of all bytes at 16 bit hold 1.6 of 16 experts a layer: K = 1.
    assert ((plan.placement.tier == HBM).sum(axis=1) == 1).all()
    assert (plan.placement.bitwidth[plan.placement.tier == HBM] == 16).all()
    for layer in range(MODEL.n_layers):
        ranking = np.argsort(-load[layer], kind="stable")
        assert plan.placement.tier[layer, ranking[0]] == HBM
        far = plan.placement.bitwidth[layer, ranking[1:]].astype(int)
        assert (np.diff(far) <= 0).all()
        assert far.sum() == 15 * 3
    assert policy(observe(random_load(3))) is plan
    assert policy(observe(random_load(3), n_admitted=1)) is not plan


def test_context_aware_mixes_counts_and_gates_by_alpha():
    counts, gates = np.eye(16)[[0, 0, 0]], np.eye(16)[[5, 5, 5]]
    seen = observe(counts) | {"gate_share": gates.astype(np.float32)}
    for alpha, expert in ((0.9, 0), (0.1, 5)):
        plan = started(f"context_aware:alpha={alpha}")(seen)
        assert (plan.placement.tier[:, expert] == HBM).all()


def test_context_aware_narrows_its_hbm_copies_until_one_per_layer_fits():
    budget = MODEL.n_layers * expert_bytes(MODEL, SYSTEM.format, 8) + 1
    plan = started("context_aware")(observe(random_load(), budget=budget))
    assert (plan.placement.bitwidth[plan.placement.tier == HBM] == 8).all()
    assert hot_count(plan) == MODEL.n_layers
