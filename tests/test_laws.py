"""Laws of the model, each with its preconditions, and counterexamples where a law stops to hold."""

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ndp_gym.outcome import Outcome
from ndp_gym.plan import Placement, Plan
from ndp_gym.simulate import State, Window, initial_state, transition
from ndp_gym.specs import MoEKernel, Service, SystemSpec
from tests.random_cases import Case, random_case
from tests.toy import MODEL, ONE_EXPERT_PER_TOKEN, SYSTEM, plan_of, window_of

SEEDS = st.integers(0, 2**32 - 1)
FAST = settings(max_examples=60, deadline=None)
ALL_FAR = [[1, 1, 1, 1], [1, 1, 1, 1]]


def episode(case: Case) -> list[tuple[State, Outcome]]:
    state, results = initial_state(case.model, case.system), []
    for plan, window, budget in zip(case.plans, case.windows, case.budgets, strict=True):
        state, out = transition(
            state, plan, window, case.model, case.system, budget_bytes=budget, quality=case.quality
        )
        results.append((state, out))
    return results


def fixed_residency(case: Case) -> Case:
    """The first plan and budget in every window, and kernels that do not depend on bits.

    In place of the best split, which weighs less than the layer's whole time, everything moves.
    """
    gpu = case.system.gpu
    kernels = {name: MoEKernel(1e-5, 0.8) for name in gpu.moe_kernels}
    system = replace(case.system, gpu=replace(gpu, moe_kernels=kernels))
    plan, n = case.plans[0], len(case.plans)
    if plan.service is not None and plan.service.kind == "balance":
        plan = replace(plan, service=Service(kind="balance", credit=plan.service.credit or 1.0))
    ranked = replace(plan, migration_order=np.zeros(plan.placement.tier.shape))
    return replace(case, system=system, plans=[ranked] * n, budgets=[case.budgets[0]] * n)


def faster(system: SystemSpec, part: str, factor: float) -> SystemSpec:
    device = getattr(system, part)
    rate = device.bandwidth_bytes_per_s * factor
    return replace(system, **{part: replace(device, bandwidth_bytes_per_s=rate)})


@given(seed=SEEDS, factor=st.floats(1.0, 100.0), part=st.sampled_from(["gpu", "link", "far"]))
@FAST
def test_with_fixed_residency_more_bandwidth_is_never_slower(
    seed: int, factor: float, part: str
) -> None:
    case = fixed_residency(random_case(seed))
    quick = replace(case, system=faster(case.system, part, factor))
    for (_, slow), (_, fast) in zip(episode(case), episode(quick), strict=True):
        assert slow.migration_bytes == fast.migration_bytes == 0
        # A prefetch may find less of an earlier step to hide behind, but not lose more than it won.
        assert (fast.step_s.cumsum() <= slow.step_s.cumsum() * (1 + 1e-12)).all()
        assert fast.hits == slow.hits


def test_a_faster_link_can_be_slower_by_landing_a_promotion_on_a_busy_gpu() -> None:
    # Far, the two experts of layer 0 take 0.3 + 2 * 0.02 ms; promoted at 16 bit, one takes 1.6 ms.
    far = replace(SYSTEM.far, bandwidth_bytes_per_s=50 * SYSTEM.far.bandwidth_bytes_per_s)
    slow = replace(SYSTEM, far=replace(far, flops_per_s=1e9))
    fast = faster(slow, "link", 10.0)
    token = [[0, 1], [2, 3]]
    promote = plan_of([[0, 1, 1, 1], [1, 1, 1, 1]], [[16, 4, 4, 4], [4] * 4])
    seconds = {}
    for name, system in (("slow", slow), ("fast", fast)):
        state, _ = transition(
            initial_state(MODEL, system), plan_of(ALL_FAR), window_of([[token]]), MODEL, system,
            budget_bytes=12_000,
        )  # fmt: skip
        _, out = transition(
            state, promote, window_of([[token] * 4]), MODEL, system, budget_bytes=12_000
        )
        seconds[name] = float(out.decode_s)
    assert seconds["fast"] > seconds["slow"]


def test_a_faster_link_can_be_slower_by_making_a_copy_look_better_than_it_is() -> None:
    # Two far experts take 2 ms; one copied, read and 1 ms far take 3 / 1.8 + 0.375 = 2.042 ms at
    # 1.8 MB/s and 1.953 ms at 1.9: then it is moved, and its 0.2 ms of launch count too.
    token, plan = [[0, 1], [2, 3]], plan_of(ALL_FAR, service=Service(kind="balance"))
    system = replace(SYSTEM, link=replace(SYSTEM.link, latency_s=0.0))
    seconds = {}
    for rate in (1.8, 1.9):
        _, out = transition(
            initial_state(MODEL, system), plan, window_of([[token]]), MODEL,
            faster(system, "link", rate), budget_bytes=0,
        )  # fmt: skip
        seconds[rate] = float(out.layer_s[0])
    np.testing.assert_allclose(seconds[1.8], (0.45025 + 2 + 0.2 / 1.8) * 1e-3)
    np.testing.assert_allclose(seconds[1.9], (0.45025 + 0.2 + 0.375 + 3 / 1.9) * 1e-3)
    assert seconds[1.9] > seconds[1.8]


def test_a_larger_fifo_cache_can_miss_more() -> None:
    # Belady's anomaly (Belady, Nelson and Shedler 1969): 9 faults with 3 frames, 10 with 4.
    model = replace(ONE_EXPERT_PER_TOKEN, n_experts=5)
    visits = [0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 4]
    plan = plan_of([[1] * 5], 4, service=Service(kind="fetch", cache="fifo"))
    window = window_of([[[[e]] for e in visits]], gates=[1.0])
    faults = []
    for frames in (3, 4):
        _, out = transition(
            initial_state(model, SYSTEM), plan, window, model, SYSTEM, budget_bytes=3000 * frames
        )
        faults.append(int(out.routed - out.hits))
    assert faults == [9, 10]


@given(seed=SEEDS)
@FAST
def test_everything_is_finite_and_never_negative(seed: int) -> None:
    for _, out in episode(random_case(seed)):
        for f in fields(out):
            value = np.asarray(getattr(out, f.name))
            assert np.isfinite(value).all(), f.name
            assert (value >= (-1e-15 if f.name == "stall_s" else 0)).all(), f.name


@given(seed=SEEDS)
@FAST
def test_hbm_never_holds_more_than_the_budget(seed: int) -> None:
    case = random_case(seed)
    size = np.zeros(17, dtype=np.int64)
    for bits in case.system.stored_bits:
        weight = case.system.format.bits_per_weight[bits]
        size[bits] = round(case.model.expert_params * weight / 8)
    for (state, _), budget in zip(episode(case), case.budgets, strict=True):
        pinned = np.maximum(size[state.hbm_bits], size[state.target_bits]).sum()
        assert pinned + size[state.cache_bits].sum() <= budget
        assert not ((state.cache_bits > 0) & (state.hbm_bits > 0)).any()


def permuted(case: Case, order: NDArray[np.int64]) -> Case:
    """The same case with expert ``e`` of layer ``l`` renamed to ``order[l, e]``."""
    back = np.argsort(order, axis=1)
    layers = np.arange(case.model.n_layers)[:, None]

    def rename(plan: Plan) -> Plan:
        assert plan.migration_order is not None
        return replace(
            plan,
            placement=Placement(
                tier=plan.placement.tier[layers, back],
                bitwidth=plan.placement.bitwidth[layers, back],
            ),
            migration_order=plan.migration_order[layers, back],
        )

    def renamed(window: Window) -> Window:
        ids = order[layers, window.expert_ids.astype(np.int64)]
        return replace(window, expert_ids=ids.astype(np.uint8))

    supers = tuple((layer, int(order[layer, e])) for layer, e in case.model.super_experts)
    return replace(
        case,
        model=replace(case.model, super_experts=supers),
        plans=[rename(plan) for plan in case.plans],
        windows=[renamed(window) for window in case.windows],
    )


@given(seed=SEEDS)
@FAST
def test_renaming_experts_renames_the_results(seed: int) -> None:
    # Precondition: priorities without ties, because ties go by the name of the expert.
    case, rng = random_case(seed), np.random.default_rng(seed)
    shape = (case.model.n_layers, case.model.n_experts)
    ranked = [replace(plan, migration_order=rng.normal(size=shape)) for plan in case.plans]
    case = replace(case, plans=ranked)
    order = rng.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)
    layers = np.arange(shape[0])[:, None]
    for (was, out), (now, renamed) in zip(
        episode(case), episode(permuted(case, order)), strict=True
    ):
        for name in ("counts", "gate_energy"):
            np.testing.assert_allclose(
                getattr(renamed, name)[layers, order], getattr(out, name), rtol=1e-12
            )
        for name in ("hbm_bits", "far_bits", "target_bits", "cache_bits", "made_bits"):
            np.testing.assert_array_equal(getattr(now, name)[layers, order], getattr(was, name))
        for f in fields(out):
            if f.name not in ("counts", "gate_energy"):
                np.testing.assert_allclose(
                    getattr(renamed, f.name), getattr(out, f.name), rtol=1e-9, atol=1e-15
                )


@given(seed=SEEDS)
@FAST
def test_more_bits_are_never_worse_or_smaller(seed: int) -> None:
    # Precondition: an error table that falls with the width, as the toy's does.
    case, rng = random_case(seed), np.random.default_rng(seed)
    plan, window = case.plans[0], case.windows[0]
    widths = np.array(case.system.stored_bits[::-1])
    now = np.searchsorted(widths, plan.placement.bitwidth)
    raised = widths[np.minimum(now + rng.integers(0, 2, now.shape), len(widths) - 1)]
    wider = replace(plan, placement=replace(plan.placement, bitwidth=raised.astype(np.uint8)))
    losses, sizes = [], []
    for choice in (plan, wider):
        _, out = transition(
            initial_state(case.model, case.system), choice, window, case.model, case.system,
            budget_bytes=10**9, quality=case.quality,
        )  # fmt: skip
        losses.append(float(out.delta_nll))
        sizes.append(int(out.hbm_weight_bytes + out.far_weight_bytes))
    assert losses[1] <= losses[0] + 1e-12
    assert sizes[1] >= sizes[0]


@given(seed=SEEDS)
@FAST
def test_the_reference_depends_on_the_routing_only(seed: int) -> None:
    case = random_case(seed)
    shape = (case.model.n_layers, case.model.n_experts)
    widest = case.system.stored_bits[0]
    far = Placement(tier=np.ones(shape, np.uint8), bitwidth=np.full(shape, widest, np.uint8))
    plain = replace(case, plans=[Plan(placement=far)] * len(case.plans))
    for (_, a), (_, b) in zip(episode(case), episode(plain), strict=True):
        for name in ("ref_decode_s", "ref_delta_nll", "ref_layer_s", "ref_layer_error"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
