"""The balance planner: within budget, balanced, quiet, and honest about what the link can bring."""

from dataclasses import replace

import numpy as np
import pytest

from ndp_gym import evaluate, presets
from ndp_gym.cost import cost_table, expert_bytes
from ndp_gym.forecast import Blend, Forecaster, expected, known, mixed, shares
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.lanes import Lanes
from ndp_gym.plan import FAR, HBM
from ndp_gym.planners import Copies, Knobs, Nudges, balance, facts_of, hot_plan
from ndp_gym.policy import PolicyContext, resolve
from ndp_gym.quality import QualityModel
from ndp_gym.reward import reward_terms
from ndp_gym.rollout import Task, run_policy, train_profile
from policies.balance import Balance
from tests.conftest import make_trace
from tests.test_policies import MODEL, SHAPE, SYSTEM, charged_bytes, observe, random_load

ROUTED = MODEL.routed_bytes16
NO_LAUNCH = replace(
    SYSTEM,
    gpu=replace(
        SYSTEM.gpu,
        moe_kernels={k: v._replace(launch_s=0.0) for k, v in SYSTEM.gpu.moe_kernels.items()},
    ),
)


def plan_for(load, *, system=SYSTEM, budget=0.10, before=None, model=MODEL, knobs=None, weight=4.0):
    """The plan for constant ``load`` of four tokens; ``before`` has fully arrived."""
    facts = facts_of(model, system, QualityModel(), weight, 16)
    nothing = np.zeros(load.shape, np.int64)
    copies = Copies(planned=nothing, present=nothing)
    if before is not None:
        bits = before.placement.bitwidth.astype(np.int64)
        copies = Copies(planned=bits, present=np.where(before.placement.tier == HBM, bits, 0))
    routing = expected(shares(load), 4.0, 2000.0, model.top_k)
    plan, guesses = balance(facts, routing, copies, budget * ROUTED, knobs or Knobs())
    assert all(guess.step_s > 0 for guess in guesses)
    return plan


def hot_counts(plan):
    return (plan.placement.tier == HBM).sum(axis=1)


@pytest.mark.parametrize("system", [SYSTEM, NO_LAUNCH, presets.system("h100_fetch")])
@pytest.mark.parametrize("budget", [0.0, 0.003, 0.03, 0.1, 0.5, 2.0])
def test_plans_keep_the_budget_from_any_placement_that_does(system, budget):
    before = None
    for seed in range(6):
        load = random_load(seed, skew=1 + seed)
        plan = plan_for(load, system=system, budget=budget, before=before)
        assert charged_bytes(plan, before, system=system) <= budget * ROUTED
        before = plan


def test_energy_per_load_is_what_an_expert_keeps():
    share, load = np.array([[0.5, 0.3, 0.2]]), np.array([[2.0, 6.0, 2.0]])
    gates = np.array([[0.4, 0.4, 0.2]])
    usual = Blend().energy(share, gates, load)
    np.testing.assert_allclose(usual, 0.5 * share + 0.5 * gates)
    found = Blend(gates=0.0, intensity=1.0).energy(share, gates, load)
    each = (gates + 0.5 * share) / (load / 10 + 0.5 * share)
    np.testing.assert_allclose(found, share * each / (share * each).sum())
    assert found[0, 0] > share[0, 0]  # twice the energy per load of the second expert
    np.testing.assert_allclose(Blend(intensity=1.0).energy(share, gates, 0 * load), usual)
    none = np.array([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(Blend(intensity=1.0).energy(none, none, none), none)


@pytest.mark.parametrize("seed", range(4))
def test_nudges_of_one_change_nothing_and_a_layers_own_routing_counts(seed):
    load, facts = random_load(seed, skew=3), facts_of(MODEL, SYSTEM, QualityModel(), 4.0, 16)
    nothing, ones = np.zeros(load.shape, np.int64), np.ones(len(load))
    routing, mirrored = (
        expected(shares(values), 4.0, 2000.0, MODEL.top_k) for values in (load, load[:, ::-1])
    )
    problem = facts, routing, Copies(planned=nothing, present=nothing), 0.1 * ROUTED, Knobs()
    plain, _ = balance(*problem)
    same, _ = balance(*problem, nudges=Nudges(routing, ones, ones, ones))
    np.testing.assert_array_equal(same.placement.tier, plain.placement.tier)
    np.testing.assert_array_equal(same.placement.bitwidth, plain.placement.bitwidth)
    other, _ = balance(*problem, nudges=Nudges(mirrored, ones, ones, ones))
    want, _ = balance(facts, mirrored, *problem[2:])
    agree = other.placement.tier == want.placement.tier
    assert agree.mean() > 0.95
    is_far = (other.placement.tier == FAR) & (want.placement.tier == FAR)
    np.testing.assert_allclose(
        other.placement.bitwidth[is_far], want.placement.bitwidth[is_far], atol=1
    )
    dear, _ = balance(*problem, nudges=Nudges(routing, ones, 8 * ones, ones))
    assert dear.placement.bitwidth.mean() < plain.placement.bitwidth.mean()


@pytest.mark.parametrize("system", [SYSTEM, NO_LAUNCH])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_moves_while_loads_stay_the_same(system, seed):
    load = random_load(seed)
    first = plan_for(load, system=system)
    second = plan_for(load, system=system, before=first)
    third = plan_for(load, system=system, before=second)
    assert np.array_equal(second.placement.tier, first.placement.tier)
    assert np.array_equal(third.placement.tier, first.placement.tier)
    hot = first.placement.tier == HBM
    assert np.array_equal(second.placement.bitwidth[hot], first.placement.bitwidth[hot])


def test_small_noise_moves_less_than_without_hysteresis():
    load, rng = random_load(0), np.random.default_rng(0)

    def moved(knobs):
        before, total = plan_for(load), 0
        for _ in range(8):
            noisy = load * rng.uniform(0.8, 1.25, SHAPE)
            plan = plan_for(noisy, before=before, knobs=knobs)
            total += int(((plan.placement.tier == HBM) & (before.placement.tier == FAR)).sum())
            before = plan
        return total

    assert moved(Knobs(hysteresis=0.3)) < moved(Knobs(hysteresis=0.0, min_gain=0.0))


def test_fewer_experts_are_hot_where_the_far_device_is_faster():
    counts = []
    for factor in (1, 3, 10, 100):
        far = replace(
            SYSTEM.far,
            bandwidth_bytes_per_s=SYSTEM.far.bandwidth_bytes_per_s * factor,
            flops_per_s=SYSTEM.far.flops_per_s * factor,
        )
        # HBM is large enough for everything, so only balance decides.
        plan = plan_for(random_load(), system=replace(SYSTEM, far=far), budget=2.0)
        counts.append(int(hot_counts(plan).sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_one_width_no_launch_and_room_for_all_gives_the_split_of_least_expected_maximum():
    format4 = replace(
        SYSTEM.format,
        **{k: {4: getattr(SYSTEM.format, k)[4]} for k in ("bits_per_weight", "rel_mse", "kernel")},
    )
    # A far device as fast as 80 % of the GPU, so that the split is interior.
    far = replace(SYSTEM.far, bandwidth_bytes_per_s=6e12, flops_per_s=1e16)
    link = replace(SYSTEM.link, bandwidth_bytes_per_s=1e15, latency_s=0.0)
    system = replace(NO_LAUNCH, far=far, link=link, format=format4, stored_bits=(4,))
    load = random_load(1)
    plan = plan_for(load, system=system, budget=2.0, knobs=Knobs(moves=0))
    table = cost_table(MODEL, system)
    active = expected(shares(load), 4.0, 0.0, MODEL.top_k).active
    for layer in range(MODEL.n_layers):
        chance = np.sort(active[layer])[::-1]
        gpu, far_s = table.gpu_weight_s[0], table.far_weight_s[0]
        spread = (chance * (1 - chance)).cumsum()
        times = []
        for h in range(len(chance) + 1):
            a, b = gpu * chance[:h].sum(), far_s * chance[h:].sum()
            hot_var = spread[h - 1] if h else 0.0
            variance = gpu**2 * hot_var + far_s**2 * (spread[-1] - hot_var)
            times.append((a + b + np.sqrt((a - b) ** 2 + 2 / np.pi * variance)) / 2)
        assert hot_counts(plan)[layer] == int(np.argmin(times))
        assert 0 < hot_counts(plan)[layer] < len(chance)


def test_the_search_finds_all_experts_in_hbm_where_one_step_at_a_time_would_not():
    # At 2.4 bits per weight every expert fits at 2 bits, and the far device is then not needed:
    # worth much in log time, little per expert while the far device is still the slower side.
    load = np.full(SHAPE, 4 * MODEL.top_k / MODEL.n_experts)
    slow = replace(NO_LAUNCH.far, bandwidth_bytes_per_s=NO_LAUNCH.far.bandwidth_bytes_per_s / 30)
    plan = plan_for(load, system=replace(NO_LAUNCH, far=slow), budget=0.15)
    assert (plan.placement.tier == HBM).all()


def test_quality_is_bought_with_bits_where_it_is_worth_more():
    load = random_load()
    means = [
        plan_for(load, weight=weight).placement.bitwidth.astype(float).mean()
        for weight in (0.1, 4.0, 100.0)
    ]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_super_experts_are_never_served_at_two_bits_or_fewer():
    model = replace(MODEL, super_experts=((1, 5),))
    load = random_load()
    load[1, 5] = 0.01
    for weight in (0.01, 1.0):
        plan = plan_for(load, model=model, weight=weight, knobs=Knobs(price=3.0))
        assert plan.placement.bitwidth[1, 5] > 2
    assert plan_for(load, weight=0.01, knobs=Knobs(price=3.0)).placement.bitwidth[1, 5] <= 2


def test_promotions_that_cannot_arrive_wait_and_old_copies_stay_until_they_are_replaced():
    slow = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=2e9))
    first = plan_for(random_load(0), system=slow)
    eager = plan_for(
        random_load(1), system=slow, before=first, knobs=Knobs(migration_cap=1e9, hysteresis=0)
    )
    staged = plan_for(
        random_load(1), system=slow, before=first, knobs=Knobs(migration_cap=0.2, hysteresis=0)
    )

    size = {b: expert_bytes(MODEL, slow.format, b) for b in slow.stored_bits}

    def bytes_where(plan, mask):
        return sum(size[int(b)] for b in plan.placement.bitwidth[mask])

    def promoted(plan):
        same = plan.placement.bitwidth == first.placement.bitwidth
        there = (first.placement.tier == HBM) & same
        return bytes_where(plan, (plan.placement.tier == HBM) & ~there)

    def demoted(plan):
        gone = (first.placement.tier == HBM) & (plan.placement.tier == FAR)
        return bytes_where(first, gone)

    assert 0 < promoted(staged) < promoted(eager)
    assert demoted(staged) < demoted(eager)


def test_a_requantising_device_is_not_asked_to_remake_copies_for_noise():
    system = replace(SYSTEM, requantise=True)
    load, rng = random_load(0), np.random.default_rng(1)
    first = plan_for(load, system=system)
    again = plan_for(load * rng.uniform(0.9, 1.1, SHAPE), system=system, before=first)
    replicas = plan_for(load * rng.uniform(0.9, 1.1, SHAPE), before=plan_for(load))
    changed = (again.placement.bitwidth != first.placement.bitwidth).sum()
    assert changed <= (replicas.placement.bitwidth != plan_for(load).placement.bitwidth).sum()
    assert changed <= 2


def test_hot_plan_breaks_ties_by_code_and_fills_the_budget():
    size = expert_bytes(MODEL, SYSTEM.format, 4)
    plan = hot_plan(np.zeros(SHAPE), MODEL, SYSTEM, 5 * size + 1)
    assert (np.flatnonzero(plan.placement.tier.ravel() == HBM) == np.arange(5)).all()
    layered = hot_plan(np.zeros(SHAPE), MODEL, SYSTEM, 7 * size, per_layer=True)
    assert list(hot_counts(layered)) == [2, 2, 2]


# Forecasts


def test_the_forecast_moves_from_prompts_to_what_is_decoded():
    prompt, decode = random_load(0), random_load(1)
    forecaster = Forecaster(Blend(floor=0.0), MODEL.top_k)
    first = forecaster(observe(np.zeros(SHAPE), prefill=prompt, n_admitted=4))
    assert np.allclose(first.load, prompt, atol=1e-5)
    distances = [
        np.abs(forecaster(observe(decode, prefill=prompt)).load - decode).sum() for _ in range(5)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.25 * np.abs(prompt - decode).sum()


def test_the_forecast_forgets_requests_that_were_replaced():
    old, new = random_load(0), random_load(1)
    forecaster = Forecaster(Blend(floor=0.0), MODEL.top_k)
    for _ in range(5):
        forecaster(observe(old))
    replaced = forecaster(observe(old, prefill=new, n_admitted=4))
    assert np.allclose(replaced.load, new, atol=1e-5)


def test_a_forecast_has_top_k_experts_per_token_and_probabilities():
    routing = Forecaster(Blend(), MODEL.top_k, random_load(3))(observe(random_load(0)))
    assert np.allclose(routing.load.sum(axis=1), 4 * MODEL.top_k, rtol=0.05)
    assert np.allclose(routing.energy.sum(axis=1), 1.0)
    assert ((routing.active > 0) & (routing.active <= 1)).all()
    assert (routing.active <= routing.load + 1e-9).all()


def test_known_counts_ignore_steps_without_tokens():
    counts = np.zeros((4, 1, 3), np.int64)
    counts[0, 0] = [2, 1, 1]
    counts[1, 0] = [2, 2, 0]
    routing = known(counts, 10.0, 2)
    assert routing.load.tolist() == [[2.0, 1.5, 0.5]]
    assert routing.active.tolist() == [[1.0, 1.0, 0.5]]
    assert routing.n_tokens == 2.0


def test_mixed_forecasts_weigh_loads_and_keep_the_tokens_of_the_first():
    a = expected(shares(random_load(0)), 4.0, 100.0, 2)
    b = expected(shares(random_load(1)), 2.0, 50.0, 2)
    both = mixed(a, b, 0.75)
    assert np.allclose(both.load, 0.75 * a.load + 0.25 * b.load)
    assert (both.n_tokens, both.context) == (4.0, 100.0)


# In the simulator


def run(name, trace, model, system, n_windows=8):
    """(mean reward, repairs) of one policy over one lane."""
    lanes = Lanes(trace, model, system, batch_size=4, window=4, hbm_budget=0.15)
    lanes.reset(0, np.arange(len(trace.requests.start)))
    policy = resolve(name)()
    policy.reset(
        PolicyContext(
            model=model,
            system=system,
            batch_size=4,
            window=4,
            hbm_budget_bytes=int(lanes.budgets()[0]),
            profile=np.ones((model.n_layers, model.n_experts)),
        )
    )
    rewards, repaired = [], 0
    while not lanes.is_done[0] and len(rewards) < n_windows:
        plan = policy({key: value[0] for key, value in lanes.observe().items()})
        order = plan.migration_order
        outcome = lanes.advance(
            plan.placement.tier[None],
            plan.placement.bitwidth[None],
            None if order is None else order[None],
            None if plan.service is None else (plan.service,),
        )
        terms = reward_terms(outcome)
        rewards.append(float(terms["throughput"][0] + 4 * terms["quality"][0]))
        repaired += int(outcome.n_repaired[0])
    return float(np.mean(rewards)), repaired


@pytest.fixture(scope="module")
def rewards():
    trace = make_trace(n_layers=3, n_experts=16, top_k=2, n_conversations=12)
    names = ("all_far4", "random", "prefill_topk", "ema", "context_aware", "balance")
    return {name: run(name, trace, MODEL, presets.system("h100_cxl_pnm")) for name in names}


def test_no_policy_that_promises_feasibility_is_repaired(rewards):
    assert {name: repaired for name, (_, repaired) in rewards.items()} == dict.fromkeys(rewards, 0)


def test_balance_earns_more_than_the_simpler_heuristics(rewards):
    best = max(value for name, (value, _) in rewards.items() if name != "balance")
    assert rewards["all_far4"][0] == pytest.approx(0.0, abs=1e-9)
    assert rewards["balance"][0] > best


def test_busy_experts_move_where_the_link_is_worth_the_launches():
    load = random_load(2)
    fast = replace(SYSTEM.link, bandwidth_bytes_per_s=SYSTEM.far.bandwidth_bytes_per_s)
    slow = replace(SYSTEM.link, bandwidth_bytes_per_s=1e8)
    for link, moves in ((fast, True), (slow, False)):
        plan = plan_for(load, system=replace(NO_LAUNCH, link=link), budget=0.02)
        assert (plan.service is not None and plan.service.kind == "balance") == moves
    plan = plan_for(load, system=replace(NO_LAUNCH, link=fast), budget=0.02, knobs=Knobs(moves=0))
    assert plan.service is None
    stores = replace(NO_LAUNCH, far=replace(NO_LAUNCH.far, can_compute=False), link=fast)
    assert plan_for(load, system=stores, budget=0.02).service is None


def test_expected_seconds_with_moves_are_those_of_the_simulator():
    trace = open_trace(None)
    policy = Balance()
    task = Task(
        trace=trace, model=find_model(None, trace), system=find_system(None), batch_size=8,
        window=16, hbm_budget=0.1, split="val", scheduling="continuous", quality=QualityModel(),
        quality_weight=4.0, max_windows=48, profile=train_profile(trace),
    )  # fmt: skip
    windows, guessed = [], []

    def watch(replayed):
        windows.append(replayed)
        guessed.append(policy.guesses[1].step_s)

    run_policy(policy, task, seed=0, watch=watch)
    moved = [w.plan.service is not None and w.plan.service.kind == "balance" for w in windows]
    assert np.mean(moved) > 0.9
    measured = [w.outcome.decode_s / (w.outcome.step_tokens > 0).sum() for w in windows]
    ratio = np.array(measured)[moved] / np.array(guessed)[moved]
    assert 0.95 < ratio[8:].mean() < 1.15  # copies are under way at first


def test_moving_is_worth_what_it_should_be_on_the_bundled_recording():
    result = evaluate(["balance:moves=0", "balance:moves=1"], split="val", max_windows=48)
    one, other = (row["reward"] for row in result.rows[-2:])
    assert other > one + 0.03
