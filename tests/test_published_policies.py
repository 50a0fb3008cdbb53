"""The property that defines each published system, on observations made by hand."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import presets
from ndp_gym.bit_ladder import exact_widths
from ndp_gym.cost import cost_table, uniform_distinct
from ndp_gym.evaluation import evaluate
from ndp_gym.plan import FAR, HBM
from ndp_gym.policy import InfeasibleError, MissingProfileError, PolicyContext, resolve
from ndp_gym.predictor import accuracy_at, degraded, prefetch_at
from policies import POLICIES
from policies.fiddler import stays
from policies.moe_speq import governor
from tests.test_policies import (
    BUDGET,
    MODEL,
    SHAPE,
    SYSTEM,
    charged_bytes,
    hot_count,
    known_future,
    observe,
    random_load,
    same_hbm,
    started,
)

PUBLISHED = {
    "matched": {"hobbit", "monde", "monde_seed", "kt_random", "kt_uniform", "kt_front",
                "kt_frequency", "kt_dynamic"},
    "mechanism": {"expertflow", "expertflow_cache", "fiddler", "mc_moe", "mixtral_offloading",
                  "moe_infinity", "moe_speq"},
}  # fmt: skip
STORAGE = presets.system("h100_cxl_expander")


def service_of(plan):
    assert plan.service is not None
    return plan.service


def test_every_published_system_says_whether_a_number_was_matched():
    for label, names in PUBLISHED.items():
        for name in names:
            policy = resolve(name)()
            assert policy.label == label, name
            assert f"**{label}**" in type(policy).__doc__, name
            assert "pproximated" in type(policy).__doc__ or name.startswith("monde"), name
    assert set().union(*PUBLISHED.values()) <= set(POLICIES)


def test_the_page_of_systems_has_a_row_for_each_with_its_label():
    page = (Path(__file__).parent.parent / "docs/systems.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for label, names in PUBLISHED.items():
        for name in names:
            assert any(f"`{name}`" in row and row.endswith(f"| {label} |") for row in rows), name


@pytest.mark.parametrize(
    "name",
    ["monde", "monde_seed", "kt_random", "kt_uniform", "kt_front", "kt_frequency", "kt_dynamic"],
)
def test_who_computes_far_says_so_where_the_far_device_only_stores(name):
    with pytest.raises(InfeasibleError, match=r"computes experts on the far device.*only stores"):
        started(name, system=STORAGE)


@pytest.mark.parametrize(
    "name",
    ["hobbit", "fiddler", "mc_moe", "mixtral_offloading", "moe_infinity", "expertflow",
     "expertflow_cache", "moe_speq"],
)  # fmt: skip
def test_the_others_fetch_where_the_far_device_only_stores(name):
    plan = started(name, system=STORAGE)(observe(random_load()))
    assert plan.service is None or plan.service.kind == "fetch"  # None: the system's own is fetch


def test_monde_leaves_everything_far_at_16_bit_and_balances():
    plan = started("monde")(observe(random_load()))
    assert hot_count(plan) == 0
    assert (plan.placement.bitwidth == 16).all()
    assert (service_of(plan).kind, service_of(plan).credit) == ("balance", None)


def test_the_seeds_monde_pins_the_most_popular_of_each_layer_and_spends_credit():
    profile = random_load(5)
    policy = started("monde_seed", profile=profile)
    plan = policy(observe(random_load(1)))
    assert ((plan.placement.tier == HBM).sum(axis=1) == 1).all()
    assert (plan.placement.tier[np.arange(SHAPE[0]), profile.argmax(axis=1)] == HBM).all()
    assert service_of(plan).credit == 0.27
    assert same_hbm(plan, policy(observe(random_load(2))))
    context = PolicyContext(model=MODEL, system=SYSTEM, batch_size=1, window=16, hbm_budget_bytes=1)
    with pytest.raises(MissingProfileError):
        resolve("monde_seed")().reset(context)


@pytest.mark.parametrize(
    ("profile", "widths"),
    [
        ((0.65, 0.35), (16, 4)),  # Mixtral: the first choice alone is above 0.6
        ((0.4, 0.3, 0.2, 0.1), (16, 16, 4, 4)),  # before the third: 0.7
        ((4.0, 3.0, 2.0, 1.0), (16, 16, 4, 4)),  # not normalised
        (None, (16, 16)),  # flat: 0.5 before the second of two
    ],
)
def test_hobbit_fetches_wide_while_the_better_ranks_weigh_little(profile, widths):
    model = replace(MODEL, top_k=len(profile or (1, 1)), gate_profile=profile)
    service = service_of(started("hobbit", model=model)(observe(random_load())))
    assert service.rank_bits == widths
    assert (service.kind, service.cache, service.scope) == ("fetch", "lru", "layer")
    assert service.prefetch == prefetch_at(1, 0.96)


def test_hobbit_looks_further_ahead_less_exactly():
    near, far = (
        service_of(started(f"hobbit:depth={depth}")(observe(random_load()))).prefetch.recall
        for depth in (1, 3)
    )
    assert (near, round(far, 2)) == (0.96, 0.90)


def test_fiddler_copies_an_expert_once_its_tokens_cost_more_far():
    table = cost_table(MODEL, SYSTEM)
    width = int(table.index_of[16])
    copied_s = table.copy_s[width] + table.gpu_weight_s[width]
    crossover = copied_s / table.far_token_s[width]
    everybody = np.ones(3)  # used by every token
    assert stays(table, width, everybody, 0.99 * crossover)
    assert not stays(table, width, everybody, 1.01 * crossover)
    popular = random_load(5)
    for n_live, kind in ((1, "in_place"), (8 * crossover * SHAPE[1] / MODEL.top_k, "fetch")):
        plan = started("fiddler", profile=popular)(observe(random_load(), n_live=n_live))
        assert service_of(plan).kind == kind
        hot = plan.placement.tier == HBM
        assert popular[hot].min() >= popular[~hot].max()
        assert (plan.placement.bitwidth == 16).all()


def test_ktransformers_placements_are_what_their_names_say():
    popular, prompt = random_load(5), random_load(6)
    tiers = {}
    for name in sorted(PUBLISHED["matched"]):
        if name.startswith("kt_"):
            policy = started(name, profile=popular)
            seen = observe(random_load(1), prefill=prompt, n_admitted=4)
            tiers[name] = policy(seen).placement.tier == HBM
    n_hot = tiers["kt_random"].sum()
    assert {int(tiers[name].sum()) for name in ("kt_front", "kt_frequency")} == {n_hot}
    full, part = divmod(int(n_hot), SHAPE[1])
    assert tiers["kt_front"].sum(axis=1).tolist() == [SHAPE[1]] * full + [part] * (part > 0) + [
        0
    ] * (SHAPE[0] - full - (part > 0))
    assert len(set(tiers["kt_uniform"].sum(axis=1))) == 1
    hot = tiers["kt_frequency"]
    assert popular[hot].min() >= popular[~hot].max()
    for layer, hot in enumerate(tiers["kt_dynamic"]):
        assert hot.sum() == n_hot // SHAPE[0]
        assert prompt[layer][hot].min() >= prompt[layer][~hot].max()
    with pytest.raises(ValueError, match="placement must be one of"):
        resolve("kt_front:placement=back")()


@pytest.mark.parametrize("n_experts", [2, 3, 5])
def test_mc_moe_widths_are_those_of_exhaustive_search(n_experts):
    menu, rng = np.array([3, 2, 1]), np.random.default_rng(n_experts)
    for budget in range(n_experts, 3 * n_experts + 1):
        loss = rng.random((n_experts, 3))
        got = exact_widths(loss, menu, budget)
        assert {0, 1} <= set(got.tolist())
        # two experts at 3 and 2 bit are always granted
        allowed = max(budget, 3 + 2 + n_experts - 2)
        best = min(
            loss[np.arange(n_experts), list(columns)].sum()
            for columns in itertools.product(range(3), repeat=n_experts)
            if {0, 1} <= set(columns) and menu[list(columns)].sum() <= allowed
        )
        assert menu[got].sum() <= allowed
        assert loss[np.arange(n_experts), got].sum() == pytest.approx(best)


def test_mc_moe_widths_of_four_experts_by_hand():
    # Losses 4, 2, 1 times a weight of 8, 1, 1, 1 at 1, 2, 3 bit; 7 bit. At least one at 3 and at 2:
    # 3 + 2 + 1 + 1 spends all, the heavy expert takes the 3.
    weight = np.array([1.0, 1.0, 8.0, 1.0])
    loss = weight[:, None] * np.array([1.0, 2.0, 4.0])
    widths = np.array([3, 2, 1])[exact_widths(loss, np.array([3, 2, 1]), 7)]
    assert widths[2] == 3
    assert sorted(widths) == [1, 1, 2, 3]
    assert list(exact_widths(np.ones((1, 1)), np.array([4]), 1)) == [0]


def test_mc_moe_keeps_the_average_gives_busy_experts_bits_and_fills_hbm_with_them():
    usage = random_load(5, skew=2.0)
    plan = started("mc_moe", profile=usage, system=presets.system("h100_cxl_seed_ndp"))(
        observe(random_load())
    )
    bits = plan.placement.bitwidth
    assert (bits.sum(axis=1) == int(2.5 * SHAPE[1])).all()
    assert set(np.unique(bits)) <= {1, 2, 3}
    for layer in range(SHAPE[0]):
        assert (np.diff(bits[layer][np.argsort(usage[layer])].astype(int)) >= 0).all()
    shares = usage / usage.sum(axis=1, keepdims=True)
    assert shares[plan.placement.tier == HBM].min() >= shares[plan.placement.tier == FAR].max()
    assert charged_bytes(plan, system=presets.system("h100_cxl_seed_ndp")) <= BUDGET


def test_mixtral_offloading_prefetches_one_layer_ahead_unless_told_not_to():
    service = service_of(started("mixtral_offloading")(observe(random_load())))
    assert (service.cache, service.scope) == ("lru", "layer")
    assert service.prefetch == prefetch_at(1, 0.841)
    off = started("mixtral_offloading:accuracy=0")(observe(random_load()))
    assert service_of(off).prefetch is None


def test_moe_infinity_recalls_the_request_that_began_like_this_one():
    policy = started("moe_infinity:blend=1.0")
    first, other = random_load(1), random_load(2)
    policy(observe(first, n_admitted=4))
    policy(observe(other, n_admitted=4))
    policy(observe(random_load(3), n_admitted=4))
    alike = 0.9 * first + 0.1 * random_load(4)
    hot = policy(observe(alike, n_admitted=4)).placement.tier == HBM
    early = 1 - np.arange(SHAPE[0])[:, None] / SHAPE[0]
    priority = first / first.sum(axis=1, keepdims=True) * early
    assert priority[hot].min() >= priority[~hot].max() - 1e-7
    assert hot[0].sum() >= hot[-1].sum()  # late layers can be fetched in time


def test_moe_infinity_prefetches_as_well_as_it_foresaw_the_last_window():
    policy = started("moe_infinity")
    assert service_of(policy(observe(random_load(1)))).prefetch.recall == 0  # nothing predicted yet
    steady = service_of(policy(observe(random_load(1)))).prefetch
    load = random_load(1)
    n_named = int(uniform_distinct(MODEL, 4))
    named = np.sort(load, axis=1)[:, -n_named:].sum() / load.sum()
    assert steady.recall == pytest.approx(named, rel=1e-5)
    assert service_of(policy(observe(random_load(8)))).prefetch.recall < steady.recall


def layers(link_s=0.0, stall_s=0.0):
    measured = np.zeros((SHAPE[0], 5), np.float32)
    measured[:, 2:4] = link_s, stall_s
    return {**observe(random_load()), "layer": measured}


def test_expertflow_starts_at_copy_time_over_layer_time():
    table = cost_table(MODEL, SYSTEM)
    width, n_experts = int(table.index_of[4]), float(uniform_distinct(MODEL, 4))
    gpu_s = table.gpu_launch_s[width] + n_experts * table.gpu_weight_s[width]
    horizon = np.ceil(n_experts * table.copy_s[width] / (table.layer_s[0] + gpu_s))
    ahead = service_of(started("expertflow:longest=99")(observe(random_load()))).prefetch
    assert ahead.depth == horizon > 1
    assert ahead.recall == pytest.approx(0.634 + (0.9 - 0.634) * np.exp(-0.5 * (horizon - 1)))


def test_expertflow_looks_further_while_it_stalls_and_less_far_where_the_link_is_full():
    policy = started("expertflow:longest=20")
    depths = [service_of(policy(observe(random_load()))).prefetch.depth]
    for seen in (layers(stall_s=0.1), layers(stall_s=0.1), layers(), layers(0.2, 0.1)):
        depths.append(service_of(policy(seen)).prefetch.depth)
    assert np.diff(depths).tolist() == [1, 1, 0, -1]
    fixed = started("expertflow:adaptive=False,longest=20")
    fixed(observe(random_load()))
    assert service_of(fixed(layers(stall_s=0.1))).prefetch.depth == depths[0]


def test_expertflow_cache_gives_slots_to_layers_by_predicted_demand():
    future = known_future(random_load(7))
    counts = future.next_counts().sum(axis=0)
    policy = started("expertflow_cache:accuracy=1.0", future=future)
    plan = policy(observe(random_load(1)))
    hot = plan.placement.tier == HBM
    assert counts[hot].min() >= counts[~hot].max()
    assert service_of(plan).prefetch == prefetch_at(SHAPE[0] - 1, 1.0)
    worse = started("expertflow_cache:accuracy=0.5", future=future)(observe(random_load(1)))
    assert counts[worse.placement.tier == HBM].sum() < counts[hot].sum()


def test_the_governor_takes_the_k_of_most_tokens_per_second():
    assert governor(1.0, [1.0, 1.0, 1.0]) == 3  # drafting costs nothing: all
    assert governor(0.0, [1.0, 1.0, 1.0]) == 1  # nothing is accepted
    assert governor(0.5, [1.0, 1.1, 1.6]) == 2  # 1.5 / 1, 1.75 / 1.1, 1.875 / 1.6
    k = {}
    for name, factor in (("slow link", 0.1), ("fast link", 100.0)):
        link = SYSTEM.link
        rate = factor * link.bandwidth_bytes_per_s
        system = replace(SYSTEM, link=replace(link, bandwidth_bytes_per_s=rate))
        service = service_of(started("moe_speq", system=system)(observe(random_load(), n_live=1)))
        assert service.prefetch.recall == service.prefetch.precision == 0.909
        k[name], rest = divmod(service.prefetch.depth, SHAPE[0])
        assert rest == 0
    assert 1 <= k["fast link"] <= k["slow link"] <= 8


def test_accuracy_falls_from_near_to_floor():
    curve = [accuracy_at(s, near=0.9, floor=0.6, decay=0.5) for s in (1, 2, 3, 50)]
    assert curve == pytest.approx([0.9, 0.6 + 0.3 * 0.60653, 0.6 + 0.3 * 0.36788, 0.6], rel=1e-4)


def test_a_degraded_oracle_has_the_stated_recall_and_precision():
    rng = np.random.default_rng(0)
    counts = np.where(rng.random((200, 100)) < 0.3, rng.integers(1, 9, (200, 100)), 0)
    told = degraded(counts, recall=0.8, precision=0.6, rng=rng)
    right = (told > 0) & (counts > 0)
    assert right.sum() / (counts > 0).sum() == pytest.approx(0.8, abs=0.01)
    assert right.sum() / (told > 0).sum() == pytest.approx(0.6, abs=0.01)
    assert (told[right] == counts[right]).all()
    assert np.array_equal(degraded(counts, 1.0, 1.0, rng), counts)
    assert not degraded(counts, 0.0, 0.5, rng).any()


@pytest.mark.parametrize(
    ("name", "tokens_per_s"),
    [
        # Mixtral-8x7B on the seed's simulator: 61.6 tok/s of the seed policy at 3 bit over 9.11
        ("monde", 61.6 / 9.11),
        ("monde_seed", 7.41),
        # 81.5 tok/s at 2 bit over 17.0
        ("hobbit", 81.5 / 17.0),
        ("context_aware", 61.6),
        ("context_aware:bits=2", 81.5),
    ],
)
def test_a_matched_policy_runs_at_the_speed_of_its_row_in_the_validation_table(
    mixtral_trace, name, tokens_per_s
):
    # The table pools all requests at one context; here it is the test split, at its own contexts,
    # with residents from the train split.
    rows = evaluate(
        name, mixtral_trace, systems="seed_sim", batch_sizes=(1,), hbm_budget=0.5, max_windows=100
    )
    found = next(row for row in rows if row["policy"] == name)
    assert found["tokens_per_s"] == pytest.approx(tokens_per_s, rel=0.06)
