import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndp_gym import cost, presets

SEED = presets.system("seed_sim")
MIXTRAL = presets.model("mixtral-8x7b")


def test_expert_bytes_by_hand():
    fmt = presets.fmt("mse_g128")
    assert cost.expert_bytes(MIXTRAL, fmt, 16) == 3 * 4096 * 14336 * 2
    assert cost.expert_bytes(MIXTRAL, fmt, 8) * 2 == cost.expert_bytes(MIXTRAL, fmt, 16)
    assert cost.expert_bytes(MIXTRAL, fmt, 4) == 3 * 4096 * 14336 * 17 // 32
    with pytest.raises(ValueError, match=r"bits must be in .* for format 'mse_g128', got 5"):
        cost.expert_bytes(MIXTRAL, fmt, 5)


# What this model said when its constants were fixed, ms; 0.1 % or one unit of the last digit.
UNITS = {
    "mixtral-8x7b": (2.294, 0.466, 0.323, 0.1169, 11.18, 0.03124, 0.0921, 0.00252),
    "mixtral-8x22b": (3.932, 0.799, 0.553, 0.2003, 19.17, 0.06366, 0.1381, 0.00278),
}
DIGITS = (1e-3, 1e-3, 1e-3, 1e-4, 1e-2, 1e-5, 1e-4, 1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_seed_sim_unit_values(name):
    model = presets.model(name)
    ours = [float(cost.far_expert_s(model, SEED, bits, 1)) for bits in (16, 3, 2)]
    ours += [
        float(cost.gpu_experts_s(model, SEED, {16: 1}, 1)),
        float(cost.transfer_s(cost.expert_bytes(model, SEED.format, 16), SEED.link)),
        float(cost.attention_s(model, SEED.gpu, [1152])[0]),
        cost.lm_head_s(model, SEED.gpu),
        float(cost.activation_transfer_s(model, SEED.link, 1)),
    ]
    for value, printed, digit in zip(ours, UNITS[name], DIGITS, strict=True):
        assert value * 1e3 == pytest.approx(printed, abs=max(1e-3 * printed, digit))


def test_far_compute_takes_over_above_the_array_height():
    one = cost.far_expert_s(MIXTRAL, SEED, 16, [0, 1, 4, 64])
    assert one[0] == 0
    assert one[1] == one[2]  # memory-bound up to four tokens and beyond
    assert one[3] == pytest.approx(6 * 4096 * 14336 * 64 / 2.048e12)
    half = cost.far_expert_s(MIXTRAL, SEED, 8, 64)
    assert float(half) == pytest.approx(one[3] / 2)  # time proportional to bits
    dequant = dataclasses.replace(
        SEED, far=dataclasses.replace(SEED.far, compute_scaling="dequant")
    )
    assert float(cost.far_expert_s(MIXTRAL, dequant, 4, 64)) == pytest.approx(one[3])


def test_one_launch_per_bitwidth_in_use():
    system = presets.system("h100_seed_ndp")
    one = float(cost.gpu_experts_s(MIXTRAL, system, {16: 2, 8: 0}, 2))
    read = 2 * 352_321_536 / (0.91 * 3.35e12)
    assert one == pytest.approx(25e-6 + read)
    two = float(cost.gpu_experts_s(MIXTRAL, system, {16: 1, 8: 1}, 2))
    assert two == pytest.approx(50e-6 + read / 2 + 352_321_536 / 2 / (0.84 * 3.35e12))


def test_layer_combines_branches_by_overlap_and_floor():
    serial = dataclasses.replace(SEED, overlap=0.0)
    assert float(cost.combine_s(SEED, 2.0, 3.0)) == 3.0
    assert float(cost.combine_s(serial, 2.0, 3.0)) == 5.0
    cpu = presets.system("cpu_quad_ddr4_rtx2080")
    branch = cost.far_branch_s(cpu, [0.0, 1e-6, 1e-3], [0.0, 1e-6, 0.0])
    np.testing.assert_allclose(branch, [0.0, 120e-6, 1e-3])


def test_mla_decode_becomes_compute_bound():
    model, gpu = presets.model("deepseek-v3"), presets.gpu("h100_sxm")
    grown = cost.attention_s(model, gpu, [1000])[0] - cost.attention_s(model, gpu, [0])[0]
    memory = 1000 * 2 * 576 / (0.8 * 3.35e12)
    compute = 1000 * 2 * 128 * (2 * 512 + 64) / (0.35 * 989e12)
    assert grown == pytest.approx(max(memory, compute))
    assert compute > memory


def test_sliding_layers_stop_growing():
    model, gpu = presets.model("gpt-oss-20b"), presets.gpu("h100_sxm")
    short, long = cost.attention_s(model, gpu, [128]), cost.attention_s(model, gpu, [10_000])
    assert (long[::2] == short[::2]).all()
    assert (long[1::2] > short[1::2]).all()
    assert cost.kv_bytes(model, [10_000]) == 12 * 2048 * (10_000 + 128)


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("mixtral-8x7b", 128),
        ("mixtral-8x22b", 224),
        ("deepseek-v2-lite", 30.4),
        ("deepseek-v3", 68.6),
        ("qwen1.5-moe-a2.7b", 192),
        ("qwen3-30b-a3b", 96),
        ("qwen3-235b-a22b", 188),
        ("olmoe-1b-7b", 128),
        ("phi-3.5-moe", 128),
        ("gpt-oss-20b", 48),
        ("gpt-oss-120b", 72),
        ("kimi-k2", 68.6),
        ("glm-4.5-air", 184),
        ("llama4-scout", 192),
    ],
)
def test_kv_cache_per_token(name, kib):
    assert cost.kv_bytes(presets.model(name), 1) / 1024 == pytest.approx(kib, abs=0.05)


def test_replicas_that_do_not_fit_are_refused_with_widths_and_bytes():
    with pytest.raises(ValueError, match=r"stored_bits=\(16, 4, 3, 2, 1\).* need \d+ B .*512"):
        cost.check_capacity(presets.model("deepseek-v3"), SEED)
    with pytest.raises(ValueError, match="need"):
        cost.check_capacity(presets.model("qwen3-235b-a22b"), SEED)
    cost.check_capacity(presets.model("mixtral-8x22b"), SEED)


def test_requantising_stores_the_widest_copy_and_charges_the_conversion():
    model = presets.model("mixtral-8x22b")
    far = dataclasses.replace(SEED.far, efficiency=1.0)
    system = dataclasses.replace(SEED, far=far, requantise=True)
    assert cost.stored_bytes(model, system) == model.routed_bytes16
    expected = (16 + 2.25) / 8 * model.expert_params / 512e9  # 1.33-1.36 ms by metadata
    assert cost.requantise_s(model, system, 2) == pytest.approx(expected)
    assert cost.requantise_s(model, system, 2) == pytest.approx(1.345e-3, rel=1e-3)
    assert cost.requantise_s(model, system, 16) == 0.0
    assert cost.requantise_s(model, SEED, 2) == 0.0


def test_auto_budget_is_what_kv_and_dense_weights_leave():
    left = cost.auto_budget_bytes(MIXTRAL, SEED, [100, 200], window=16)
    assert left == 85_899_345_920 - MIXTRAL.dense_bytes - 332 * 128 * 1024
    with pytest.raises(ValueError, match="KV cache must fit"):
        cost.auto_budget_bytes(MIXTRAL, SEED, [10**6], window=16)


def test_prefill_of_the_seed_simulator():
    """1.06 s and 3.18 s for 128 tokens."""
    assert cost.prefill_s(MIXTRAL, SEED, 128) == pytest.approx(1.06, abs=0.005)
    assert cost.prefill_s(presets.model("mixtral-8x22b"), SEED, 128) == pytest.approx(
        3.18, abs=0.005
    )
    assert cost.prefill_s(MIXTRAL, SEED, 0) == 0.0
    resident = cost.prefill_s(MIXTRAL, SEED, 128, np.full(32, 8))
    assert resident < 0.1 < cost.prefill_s(MIXTRAL, SEED, 128, np.full(32, 4))
    with pytest.raises(ValueError, match=r"n_resident must be in 0\.\.n_experts=8"):
        cost.prefill_s(MIXTRAL, SEED, 1, np.full(32, 9))


def test_prefill_without_far_compute_streams_everything():
    system = presets.system("h100_fetch")
    model = presets.model("deepseek-v2-lite")
    stream = model.routed_bytes16 / system.link.bandwidth_bytes_per_s
    assert cost.prefill_s(model, system, 1) > stream


def test_storage_that_cannot_compute_has_no_far_expert_time():
    system = presets.system("h100_fetch")
    with pytest.raises(ValueError, match="must compute to serve in place"):
        cost.far_expert_s(MIXTRAL, system, 4, 1)
    assert np.isinf(cost.cost_table(MIXTRAL, system).far_token_s).all()


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b"])
def test_cost_table_agrees_with_the_cost_functions(name):
    model = presets.model(name)
    system = presets.system("h100_cxl_pnm")
    table = cost.cost_table(model, system)
    for bits in system.stored_bits:
        index = table.index_of[bits]
        assert table.bits[index] == bits
        assert table.weight_bytes[index] == cost.expert_bytes(model, system.format, bits)
        for tokens in (1, 7, 300):
            far = max(
                table.far_weight_s[index],
                max(tokens, table.far_min_tokens) * table.far_token_s[index],
            )
            assert far == pytest.approx(float(cost.far_expert_s(model, system, bits, tokens)))
            gpu = table.gpu_launch_s[index] + max(
                table.gpu_weight_s[index], tokens * table.gpu_token_s
            )
            ours = cost.gpu_experts_s(model, system, {bits: 1}, tokens)
            assert gpu == pytest.approx(float(ours))
    assert (table.index_of >= 0).sum() == len(system.stored_bits)
    seen = np.where(table.layer_slides, np.minimum(3000, table.sliding_window), 3000)
    np.testing.assert_allclose(
        table.layer_s + table.kv_token_s * seen, cost.attention_s(model, system.gpu, [3000])
    )
    moved = 2 * table.link_latency_s + 5 * table.activation_token_s
    assert moved == pytest.approx(float(cost.activation_transfer_s(model, system.link, 5)))
    assert table.n_dense_full + table.n_dense_sliding == model.n_dense_layers


factors = st.floats(1.0, 100.0)


@given(factor=factors, bits=st.sampled_from((16, 4, 3, 2, 1)), tokens=st.integers(1, 512))
def test_more_far_bandwidth_or_compute_is_never_slower(factor, bits, tokens):
    slow = float(cost.far_expert_s(MIXTRAL, SEED, bits, tokens))
    for field in ("bandwidth_bytes_per_s", "flops_per_s"):
        faster = dataclasses.replace(SEED.far, **{field: getattr(SEED.far, field) * factor})
        system = dataclasses.replace(SEED, far=faster)
        assert float(cost.far_expert_s(MIXTRAL, system, bits, tokens)) <= slow


@given(factor=factors, n_bytes=st.integers(0, 10**12), tokens=st.integers(0, 512))
def test_more_link_bandwidth_is_never_slower(factor, n_bytes, tokens):
    fast = dataclasses.replace(
        SEED.link, bandwidth_bytes_per_s=SEED.link.bandwidth_bytes_per_s * factor
    )
    assert cost.transfer_s(n_bytes, fast) <= cost.transfer_s(n_bytes, SEED.link)
    slow = cost.activation_transfer_s(MIXTRAL, SEED.link, tokens)
    assert cost.activation_transfer_s(MIXTRAL, fast, tokens) <= slow
    assert (slow > 0) == (tokens > 0)


@given(factor=factors, contexts=st.lists(st.integers(0, 100_000), min_size=1, max_size=8))
def test_more_hbm_bandwidth_is_never_slower(factor, contexts):
    system = presets.system("h100_seed_ndp")
    fast_gpu = dataclasses.replace(
        system.gpu, bandwidth_bytes_per_s=system.gpu.bandwidth_bytes_per_s * factor
    )
    fast = dataclasses.replace(system, gpu=fast_gpu)
    for bits in system.stored_bits:
        slow_s = cost.all_hbm_step_s(MIXTRAL, system, bits=bits, contexts=contexts)
        assert cost.all_hbm_step_s(MIXTRAL, fast, bits=bits, contexts=contexts) <= slow_s


@pytest.mark.parametrize("name", presets.names("formats"))
def test_more_bits_are_never_smaller_nor_worse(name):
    fmt = presets.fmt(name)
    widths = sorted(fmt.bits_per_weight)
    sizes = [cost.expert_bytes(MIXTRAL, fmt, bits) for bits in widths]
    errors = [fmt.rel_mse[bits] for bits in widths]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_energy_of_published_decode_is_mostly_static():
    """About 0.10 J per token of HBM traffic against 0.653 J measured."""
    system = presets.system("h100_fetch")
    parts = cost.decode_energy(
        system, seconds=12.85e-3 / 8, hbm_bytes=26e9 / 8, far_bytes=0.0, link_bytes=0.0
    )
    assert parts.gpu_j == pytest.approx(0.10, abs=0.01)
    assert parts.static_j > 5 * parts.gpu_j
    assert parts.total_j == pytest.approx(0.653, rel=0.25)
    assert float(cost.link_energy_j(system.link, 1e9)) == pytest.approx(0.04)
    assert cost.dense_read_bytes(MIXTRAL) == MIXTRAL.dense_bytes - 2 * 32000 * 4096
