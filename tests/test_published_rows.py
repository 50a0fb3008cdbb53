"""Regression of the in-HBM and CPU-offload tables of validation.md 4.3 and 4.4.

"model" values are that document's own; the published ones are judged by ``ndp-gym validate``.
"""

import dataclasses

import numpy as np
import pytest

from ndp_gym import cost, presets
from ndp_gym.specs import MoESpec, SystemSpec

DEEPSEEK = dataclasses.replace(presets.model("deepseek-v3"), dense_bits=4.85)
QWEN3 = presets.model("qwen3-30b-a3b")

ROWS_IN_HBM = [
    ("qwen3-30b-a3b", "h100_cxl_pnm", 16, (8, 16, 32, 64, 96), (12.56, 17.78, 23.43, 28.12, 30.97)),
    ("qwen3-30b-a3b", "b200", 16, (8, 32, 128, 256), (7.17, 12.69, 20.10, 28.57)),
    ("gpt-oss-20b", "h100_mxfp4", 4, (8, 32, 64, 128), (6.27, 9.09, 11.15, 15.16)),
    ("gpt-oss-20b", "b200_mxfp4", 4, (8, 32, 64), (4.08, 6.23, 8.13)),
    ("gpt-oss-120b", "h100_mxfp4", 4, (8, 16, 32, 64), (10.18, 14.88, 21.67, 29.33)),
    ("gpt-oss-120b", "b200_mxfp4", 4, (8, 32, 64, 128), (6.39, 13.47, 18.54, 23.93)),
]


@pytest.mark.parametrize(("name", "system_name", "bits", "batches", "printed_ms"), ROWS_IN_HBM)
def test_inter_token_latency_with_all_experts_in_hbm(name, system_name, bits, batches, printed_ms):
    model, system = presets.model(name), presets.system(system_name)
    for batch, expected in zip(batches, printed_ms, strict=True):
        ours = cost.all_hbm_step_s(model, system, bits=bits, contexts=[700] * batch)
        assert ours * 1e3 == pytest.approx(expected, rel=2e-3, abs=0.006)


@pytest.mark.parametrize(
    ("system_name", "batches", "distinct", "printed_ms"),
    [
        ("h100_mxfp4", (8, 16, 32, 64), (20.6, 32.3, 47.8, 65.2), (8.67, 11.39, 15.34, 20.73)),
        ("b200_mxfp4", (8, 32, 64, 128), (20.6, 47.8, 65.2, 81.8), (5.52, 9.85, 13.63, 19.24)),
    ],
)
def test_inter_token_latency_with_the_distinct_experts_of_a_trace(
    system_name, batches, distinct, printed_ms
):
    model, system = presets.model("gpt-oss-120b"), presets.system(system_name)
    for batch, n_distinct, expected in zip(batches, distinct, printed_ms, strict=True):
        ours = cost.all_hbm_step_s(
            model, system, bits=4, contexts=[700] * batch, n_distinct=n_distinct
        )
        assert ours * 1e3 == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize(("bits", "tokens_per_s"), [(16, 193), (8, 212)])
def test_batch_1_on_h20_is_too_fast_as_documented(bits, tokens_per_s):
    step = cost.all_hbm_step_s(QWEN3, presets.system("h20"), bits=bits, contexts=[700])
    assert 1 / step == pytest.approx(tokens_per_s, rel=0.005)


@pytest.mark.parametrize(
    ("n_experts", "measured_us"), [(16, 135), (32, 234), (64, 423), (128, 818)]
)
def test_grouped_kernel_of_rtx_pro_6000(n_experts, measured_us):
    system = presets.system("rtxpro6000")
    ours = cost.gpu_experts_s(presets.model("qwen3-30b-a3b"), system, {16: n_experts}, n_experts)
    assert float(ours) * 1e6 == pytest.approx(measured_us, rel=0.05)


def offload_tokens_per_s(
    model: MoESpec, system: SystemSpec, *, bits: int, far_hits: float, hbm_hits: float
) -> float:
    """Batch-1 speed with the mean number of far and HBM hits per routed layer (validation 4.4)."""
    far = far_hits * float(cost.far_expert_s(model, system, bits, 1))
    sent = cost.activation_transfer_s(model, system.link, 1 if far_hits else 0)
    on_gpu = cost.gpu_experts_s(model, system, {bits: hbm_hits}, hbm_hits)
    experts = float(cost.combine_s(system, on_gpu, cost.far_branch_s(system, sent, far)))
    gpu = system.gpu
    layers = float(cost.attention_s(model, gpu, [0]).sum()) + model.n_layers * experts
    dense = cost.decode.dense_layers_s(model, gpu, [0])
    return 1 / (layers + dense + cost.lm_head_s(model, gpu))


@pytest.mark.parametrize(
    ("system_name", "n_experts", "printed"),
    [
        ("cpu_xeon_6454s_dual_rtx4090", 8, 14.7),
        ("cpu_xeon_6454s_rtx4090", 8, 8.16),
        ("cpu_xeon_6454s_dual_rtx4090", 6, 18.4),
        ("cpu_xeon_6454s_rtx4090", 6, 10.5),
    ],
)
def test_cpu_offload_of_deepseek_v3(system_name, n_experts, printed):
    system = presets.system(system_name)
    ours = offload_tokens_per_s(DEEPSEEK, system, bits=4, far_hits=n_experts, hbm_hits=0)
    assert ours == pytest.approx(printed, rel=0.01)


def test_cpu_offload_of_qwen3_with_a_share_on_the_gpu():
    hbm_hits = 8 * 28 / 128
    ours = offload_tokens_per_s(
        QWEN3,
        presets.system("cpu_epyc_9355_rtx5090"),
        bits=16,
        far_hits=8 - hbm_hits,
        hbm_hits=hbm_hits,
    )
    assert ours == pytest.approx(61.4, rel=0.01)


def test_cpu_offload_of_qwen3_by_whole_layers():
    """36 of 48 layers on the CPU: time is linear in the layers of each kind."""
    model = dataclasses.replace(QWEN3, dense_bits=4.85)
    system = presets.system("cpu_quad_ddr4_rtx2080")
    on_cpu = offload_tokens_per_s(model, system, bits=4, far_hits=8, hbm_hits=0)
    on_gpu = offload_tokens_per_s(model, system, bits=4, far_hits=0, hbm_hits=8)
    ours = 1 / (36 / 48 / on_cpu + 12 / 48 / on_gpu)
    assert ours == pytest.approx(38.2, rel=0.01)


def test_cpu_offload_of_fiddler_exceeds_its_one_sided_bound():
    ours = offload_tokens_per_s(
        presets.model("mixtral-8x7b"),
        presets.system("cpu_skylake_quadro_rtx6000"),
        bits=16,
        far_hits=1.5,  # about a quarter of the experts in HBM
        hbm_hits=0.5,
    )
    assert ours == pytest.approx(4.1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "bits", "seed_sim", "h100"),
    [
        ("mixtral-8x7b", 8, 207, 143),
        ("mixtral-8x7b", 4, 325, 161),
        ("mixtral-8x7b", 3, 383, 178),
        ("mixtral-8x22b", 4, 103, 63.1),
        ("mixtral-8x22b", 3, 121, 71.2),
    ],
)
def test_all_experts_in_hbm_beat_the_seed(name, bits, seed_sim, h100):
    """validation.md 4.5: the row every evaluation must contain, in tokens/s."""
    model = presets.model(name)
    widths = (16, 8, 4, 3, 2, 1)
    for system_name, printed in (("seed_sim", seed_sim), ("h100_seed_ndp", h100)):
        system = dataclasses.replace(presets.system(system_name), stored_bits=widths)
        step = cost.all_hbm_step_s(
            model, system, bits=bits, contexts=[1152], n_distinct=np.float64(model.top_k)
        )
        assert 1 / step == pytest.approx(printed, rel=0.005)
