"""One window by hand: `tests.toy` tabulates the times, every expectation is a literal sum."""

from dataclasses import fields, replace

import numpy as np
import pytest

from ndp_gym.simulate import initial_state, transition
from ndp_gym.specs import Service
from tests.random_cases import random_case
from tests.toy import (
    ALL_FAR,
    ATT,
    MS,
    OUTSIDE,
    SYSTEM,
    TOKEN,
    one_near,
    plan_of,
    start,
    then,
    window_of,
)


def test_a_layer_takes_as_long_as_the_slower_of_gpu_and_far_device() -> None:
    _, out = start(one_near(16), window_of([[TOKEN]]))
    gpu = (0.1 + 1.5) * MS  # launch + one 16-bit expert
    cross = (2 * 0.05 + 0.2) * MS
    np.testing.assert_allclose(out.gpu_s, [gpu, 0])
    np.testing.assert_allclose(out.far_s, [1 * MS, 2 * MS])
    np.testing.assert_allclose(out.link_s, [cross, cross])
    np.testing.assert_allclose(out.layer_s, [ATT + 1.6 * MS, ATT + 2.3 * MS])
    np.testing.assert_allclose(out.stall_s, [0, 2.3 * MS], atol=1e-15)
    np.testing.assert_allclose(out.decode_s, 2 * ATT + (1.6 + 2.3) * MS + OUTSIDE)


def test_without_overlap_gpu_and_far_device_take_turns() -> None:
    window = window_of([[TOKEN]])
    plan = one_near(16)
    _, serial = start(plan, window, system=replace(SYSTEM, overlap=0.0))
    _, half = start(plan, window, system=replace(SYSTEM, overlap=0.5))
    np.testing.assert_allclose(serial.layer_s, [ATT + (1.6 + 1.3) * MS, ATT + 2.3 * MS])
    np.testing.assert_allclose(half.layer_s, [ATT + (1.6 + 1.3 / 2) * MS, ATT + 2.3 * MS])


def test_each_distinct_width_on_the_gpu_pays_one_launch() -> None:
    near = [[0, 0, 0, 0], [0, 0, 0, 0]]
    window = window_of([[TOKEN]])
    _, out = start(plan_of(near, [[16, 8, 4, 4], [4, 4, 4, 4]]), window)
    # 16 and 8 bit are two widths, though both are read by the bf16 kernel
    np.testing.assert_allclose(out.gpu_s, [(0.1 + 0.1 + 1.5 + 0.75) * MS, (0.2 + 2 * 0.375) * MS])


def test_many_tokens_turn_both_devices_compute_bound() -> None:
    tokens = [[[[0, 1], [0, 1]]]] * 20  # 20 slots, one step
    plan = plan_of([[0, 1, 1, 1], [0, 1, 1, 1]], 4)
    _, out = start(plan, window_of(tokens))
    # GPU: 20 tokens * 12000 FLOP / 1.2e8 FLOP/s = 2 ms > 0.375 ms of reading
    # far: 20 tokens * 12000 FLOP * 4/16 / 24e6 FLOP/s = 2.5 ms > 1 ms of reading
    np.testing.assert_allclose(out.gpu_s, [2.2 * MS] * 2)
    np.testing.assert_allclose(out.far_s, [2.5 * MS] * 2)
    dequant = replace(SYSTEM, far=replace(SYSTEM.far, compute_scaling="dequant"))
    _, out = start(plan, window_of(tokens), system=dequant)
    np.testing.assert_allclose(out.far_s, [10 * MS] * 2)


def test_fewer_tokens_than_the_array_is_high_cost_as_much_as_that_many() -> None:
    tall = replace(SYSTEM, far=replace(SYSTEM.far, min_tokens=40))
    _, out = start(plan_of(ALL_FAR), window_of([[TOKEN]]), system=tall)
    # two experts, each 40 * 12000 * 4/16 / 24e6 = 5 ms
    np.testing.assert_allclose(out.far_s, [10 * MS] * 2)


def test_a_token_with_two_far_experts_crosses_the_link_once() -> None:
    both_far = window_of([[[[1, 2], [1, 2]]], [[[0, 3], [0, 1]]]])
    _, out = start(plan_of([[0, 1, 1, 0], [0, 1, 1, 1]]), both_far)
    # layer 0: the first token crosses, the second has both experts in HBM; layer 1: both cross
    assert out.activation_bytes == (1 + 2) * 200
    np.testing.assert_allclose(out.link_s, [(0.1 + 0.2) * MS, (0.1 + 2 * 0.2) * MS])
    assert out.hits == 2 + 1
    assert out.routed == 8


def test_a_promotion_serves_from_the_step_after_its_last_byte() -> None:
    state, _ = start(plan_of(ALL_FAR), window_of([[TOKEN]]))
    plan = one_near(16)
    state, out = then(state, plan, window_of([[TOKEN] * 4]))
    # a far step leaves the link free for 2 * (att + 2 ms) = 4.9005 ms at context 100, 1 us more per
    # token of context: 4900 + 4901 bytes, and the last of 12000 arrive in the third step
    assert out.migration_bytes == 12_000
    assert out.hits == 1
    context = np.arange(4) * 0.0005 * MS
    far_step = 2 * (ATT + context) + 2 * 2.3 * MS + OUTSIDE
    near_step = 2 * (ATT + context) + (1.6 + 2.3) * MS + OUTSIDE
    np.testing.assert_allclose(out.step_s, np.r_[far_step[:3], near_step[3]])
    assert state.queue.size == 0
    assert state.hbm_bits[0, 0] == 16


def test_promotions_get_what_activations_leave_of_the_link() -> None:
    state, _ = start(plan_of(ALL_FAR), window_of([[TOKEN]]))
    plan = one_near(16)
    after, out = then(state, plan, window_of([[TOKEN], [TOKEN]]))
    # two contexts: att = 0.40025 + 2 * 0.05 ms; both tokens cross in 0.1 + 2 * 0.2 ms,
    # t_N stays 1 ms per expert (two tokens need no second pass): spare = 2 * (0.50025 + 2) ms
    assert out.activation_bytes == 4 * 200
    assert out.migration_bytes == int(2 * (500.25 + 2000)) == 5000
    assert after.head_bytes == 5000
    np.testing.assert_allclose(out.decode_s, 2 * (0.50025 + 2.5) * MS + OUTSIDE + 0.1 * MS)


def test_the_floor_is_paid_only_by_layers_with_a_far_expert() -> None:
    slow_call = replace(SYSTEM, far=replace(SYSTEM.far, floor_s=5 * MS))
    plan = plan_of([[0, 0, 1, 1], [1, 1, 1, 1]])
    _, out = start(plan, window_of([[TOKEN]]), system=slow_call)
    np.testing.assert_allclose(out.layer_s, [ATT + (0.2 + 0.75) * MS, ATT + 5 * MS])
    np.testing.assert_allclose(out.far_s, [0, (5 - 0.3) * MS])


def test_the_first_plan_loads_in_the_foreground() -> None:
    near = [[0, 0, 1, 1], [1, 1, 0, 1]]
    state, out = start(plan_of(near, [[16, 8, 4, 4], [4, 4, 2, 4]]), window_of([[TOKEN]]))
    assert out.load_bytes == 12_000 + 6_000 + 1_500
    np.testing.assert_allclose(out.load_s, 19.5 * MS)
    assert out.migration_bytes == 0
    assert out.hits == 3
    np.testing.assert_allclose(out.decode_s, out.step_s.sum())
    assert not state.is_fresh


def test_a_demotion_is_free_and_immediate() -> None:
    state, _ = start(plan_of([[0, 0, 1, 1], [1, 1, 1, 1]], 16), window_of([[TOKEN]]))
    _, out = then(state, plan_of(ALL_FAR, 2), window_of([[TOKEN]]))
    assert out.hits == 0
    assert out.migration_bytes == out.wasted_bytes == out.load_bytes == 0
    assert out.served_tokens[1].tolist() == [0, 0, 0, 4]
    np.testing.assert_allclose(out.far_s, [1 * MS, 1 * MS])


def test_a_cancelled_copy_is_wasted_and_a_wanted_one_carries_on() -> None:
    far, near = plan_of(ALL_FAR), one_near(16)
    state, _ = start(far, window_of([[TOKEN]]))
    state, first = then(state, near, window_of([[TOKEN]]))
    assert first.migration_bytes == state.head_bytes == 4900
    kept, out = then(state, near, window_of([[TOKEN]]))
    assert out.wasted_bytes == 0
    assert kept.head_bytes == 9800
    gone, out = then(state, far, window_of([[TOKEN]]))
    assert out.wasted_bytes == 4900
    assert gone.head_bytes == gone.queue.size == 0
    other_width, out = then(state, one_near(4), window_of([[TOKEN]]))
    assert out.wasted_bytes == 4900
    assert out.migration_bytes == 3000
    assert other_width.hbm_bits[0, 0] == 4


def test_until_the_new_width_arrives_the_old_copy_serves() -> None:
    near = one_near(2)
    state, _ = start(near, window_of([[TOKEN]]))
    wider = one_near(16)
    state, out = then(state, wider, window_of([[TOKEN]]), budget=12_000)
    assert out.n_repaired == 0
    assert out.served_tokens[0].tolist() == [0, 0, 0, 1]
    assert state.hbm_bits[0, 0] == 2
    assert state.target_bits[0, 0] == 16
    narrower = one_near(2)
    _, out = then(state, narrower, window_of([[TOKEN]]))
    assert out.wasted_bytes == state.head_bytes > 0
    assert out.migration_bytes == 0


def test_a_narrower_copy_is_charged_the_old_width_until_it_arrives() -> None:
    state, _ = start(one_near(16), window_of([[TOKEN]]), budget=12_000)
    two_small = plan_of([[0, 0, 1, 1], [1, 1, 1, 1]], 4, order=[[2, 1, 0, 0], [0] * 4])
    after, out = then(state, two_small, window_of([[TOKEN]]), budget=12_000)
    assert out.n_repaired == 1  # 12000 are still held by the 16-bit copy
    assert after.target_bits[0].tolist() == [4, 0, 0, 0]
    assert after.hbm_bits[0, 0] == 4  # 3000 of the 4200 bytes the link had room for
    _, out = then(after, two_small, window_of([[TOKEN]]), budget=12_000)
    assert out.n_repaired == 0


def test_repair_moves_the_least_important_experts_to_the_far_tier() -> None:
    near = [[0, 0, 0, 1], [0, 0, 1, 1]]
    order = [[5, 1, 3, 9], [1, 4, 9, 9]]
    plan = plan_of(near, [[4, 4, 16, 4], [4, 4, 4, 4]], order=order)
    # 3000 * 4 + 12000 = 24000; the two of priority 1 go, (1, 0) before (0, 1); 18000 <= 18500
    state, out = start(plan, window_of([[TOKEN]]), budget=18_500)
    assert out.n_repaired == 2
    assert state.hbm_bits.tolist() == [[4, 0, 16, 0], [0, 4, 0, 0]]
    assert state.far_bits[0, 1] == state.far_bits[1, 0] == 4
    state, out = start(plan, window_of([[TOKEN]]), budget=21_000)
    assert out.n_repaired == 1
    assert state.hbm_bits.tolist() == [[4, 4, 16, 0], [0, 4, 0, 0]]


def test_error_counts_the_width_that_really_served_weighted_by_squared_gates() -> None:
    _, out = start(plan_of([[0, 1, 1, 1], [1] * 4], [[16, 2, 4, 4], [4] * 4]), window_of([[TOKEN]]))
    np.testing.assert_allclose(out.layer_energy, [0.75**2 + 0.25**2] * 2)
    np.testing.assert_allclose(out.layer_error, [0.25**2 * 0.1, (0.75**2 + 0.25**2) * 0.01])
    np.testing.assert_allclose(out.ref_layer_error, [0.625 * 0.01] * 2)
    # kappa 3, both layers weigh one half
    np.testing.assert_allclose(out.delta_nll, 3 * (0.5 * 0.0625 * 0.1 / 0.625 + 0.5 * 0.01))
    np.testing.assert_allclose(out.ref_delta_nll, 3 * 0.01)


def test_slots_idle_before_and_after_their_rows_and_empty_steps_take_no_time() -> None:
    _, out = start(plan_of(ALL_FAR), window_of([[TOKEN], [TOKEN] * 2, []], length=3))
    assert out.step_tokens.tolist() == [2, 1, 0]
    assert out.step_s[2] == 0
    assert out.tokens == 3
    assert out.routed == 3 * 2 * 2


def test_the_reference_is_what_all_far_at_4_bit_would_have_cost() -> None:
    window = window_of([[TOKEN] * 3, [TOKEN] * 2])
    state, far = start(plan_of(ALL_FAR), window)
    assert far.ref_decode_s == pytest.approx(float(far.decode_s), rel=1e-12)
    assert far.ref_delta_nll == pytest.approx(float(far.delta_nll), rel=1e-12)
    _, near = then(state, one_near(16), window)
    assert near.ref_decode_s == far.ref_decode_s


def test_nothing_moves_when_nothing_changes() -> None:
    plan = plan_of([[0, 0, 1, 1], [1, 0, 1, 1]], [[16, 4, 2, 4], [4, 8, 4, 4]])
    state, first = start(plan, window_of([[TOKEN] * 3]))
    after, second = then(state, plan, window_of([[TOKEN] * 3]))
    assert second.migration_bytes == second.wasted_bytes == second.load_bytes == 0
    for name in ("hbm_bits", "far_bits", "target_bits", "queue"):
        np.testing.assert_array_equal(getattr(after, name), getattr(state, name))
    assert second.decode_s == first.decode_s


@pytest.mark.parametrize("seed", range(40))
def test_tokens_and_bytes_are_conserved(seed: int) -> None:
    case = random_case(seed, n_windows=6)
    weight = {b: case.system.format.bits_per_weight[b] for b in case.system.stored_bits}
    n_bytes = {b: round(case.model.expert_params * w / 8) for b, w in weight.items()}
    in_place = Service(kind="in_place" if case.system.far.can_compute else "fetch")
    state = initial_state(case.model, case.system)
    moved = arrived = wasted = 0
    for plan, window, budget in zip(case.plans, case.windows, case.budgets, strict=True):
        before = state
        state, out = transition(
            state, replace(plan, service=in_place), window, case.model, case.system,
            budget_bytes=budget,
        )  # fmt: skip
        moved, wasted = moved + int(out.migration_bytes), wasted + int(out.wasted_bytes)
        new = (state.hbm_bits != before.hbm_bits) & (state.hbm_bits > 0) & (not before.is_fresh)
        arrived += sum(n_bytes[int(bits)] for bits in state.hbm_bits[new])
        served = int(out.served_tokens.sum())
        rows = int(window.n_rows.sum())
        assert out.tokens == rows == out.step_tokens.sum()
        assert out.routed == served == rows * case.model.n_layers * case.model.top_k
        assert out.counts.sum() == out.layer_routed.sum() == out.routed
        assert out.hits == out.layer_hits.sum()
        if in_place.kind == "in_place":
            assert out.hits == out.served_tokens[0].sum()
            assert out.routed - out.hits == out.served_tokens[1].sum()
    if in_place.kind == "in_place":
        assert moved == arrived + wasted + state.head_bytes


def test_the_same_inputs_give_the_same_outputs_and_stay_as_they_were() -> None:
    case = random_case(3)
    state = initial_state(case.model, case.system)
    for plan, window, budget in zip(case.plans, case.windows, case.budgets, strict=True):
        copy = {f.name: np.copy(getattr(state, f.name)) for f in fields(state)}
        ids = window.expert_ids.copy()
        runs = [
            transition(state, plan, window, case.model, case.system, budget_bytes=budget)
            for _ in range(2)
        ]
        for name, value in copy.items():
            np.testing.assert_array_equal(getattr(state, name), value)
        np.testing.assert_array_equal(window.expert_ids, ids)
        for part in (0, 1):  # state, outcome
            for f in fields(runs[0][part]):
                first, second = (getattr(run[part], f.name) for run in runs)
                np.testing.assert_array_equal(first, second)
        state = runs[0][0]


def test_energy_adds_traffic_flops_and_static_power() -> None:
    _, out = start(plan_of(ALL_FAR), window_of([[TOKEN]]))
    # dense weights: 2 layers * (attention 200 + router 200) + head 4000 = 4800, 2 bytes each;
    # the embedding is a look-up; KV: 2 layers * 100 tokens * 4 bytes
    gpu = (9600 + 800) * 1e-6 + 2 * 4800 * 1e-9
    far = 4 * 3000 * 1e-6 + 4 * 12_000 * 1e-9
    link = 2 * 200 * 1e-5
    static = (2 + 1) * (2 * 2.75025 + 1.6) * MS
    assert out.energy_j == pytest.approx(gpu + far + link + static, rel=1e-12)


def test_gates_of_another_type_are_refused() -> None:
    window = window_of([[TOKEN]])
    gates = np.full(window.expert_ids.shape, 0.5, dtype=np.float32)
    with pytest.raises(ValueError, match="float16"):
        start(plan_of(ALL_FAR), replace(window, gate_weights=gates))  # type: ignore[arg-type]
