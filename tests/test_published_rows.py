"""Regression of in-HBM and CPU-offload speeds.

"printed" values are what this model said when its constants were fixed; the
published ones are judged in test_validation.
"""

import dataclasses

import numpy as np
import pytest

from ndp_gym import cost, presets
from ndp_gym.units import MS
from ndp_gym.validation import cpu_offload, in_hbm

PRINTED_MS = {
    "qwen3-30b-bf16/h100": (12.56, 17.78, 23.43, 28.12, 30.97),
    "qwen3-30b-bf16/b200": (7.17, 12.69, 20.10, 28.57),
    "gpt-oss-20b-mxfp4/h100": (6.27, 9.09, 11.15, 15.16),
    "gpt-oss-20b-mxfp4/b200": (4.08, 6.23, 8.13),
    "gpt-oss-120b-mxfp4/h100": (10.18, 14.88, 21.67, 29.33),
    "gpt-oss-120b-mxfp4/b200": (6.39, 13.47, 18.54, 23.93),
}


@pytest.mark.parametrize("served", [*in_hbm.CALIBRATED, *in_hbm.TRACED])
def test_inter_token_latency_with_all_experts_in_hbm(served):
    printed = PRINTED_MS[f"{served.label}/{served.gpu}"]
    for batch, expected in zip(served.batches, printed, strict=True):
        assert served.step_s(batch) / MS == pytest.approx(expected, rel=2e-3, abs=0.006)


@pytest.mark.parametrize(
    ("served", "distinct", "printed"),
    [
        (in_hbm.TRACED[0], (20.6, 32.3, 47.8, 65.2), (8.67, 11.39, 15.34, 20.73)),
        (in_hbm.TRACED[1], (20.6, 47.8, 65.2, 81.8), (5.52, 9.85, 13.63, 19.24)),
    ],
)
def test_inter_token_latency_with_the_distinct_experts_of_a_trace(served, distinct, printed):
    for batch, n_distinct, expected in zip(served.batches, distinct, printed, strict=True):
        assert served.step_s(batch, n_distinct) / MS == pytest.approx(expected, rel=3e-3)


def test_batch_1_on_h20_is_too_fast_as_documented():
    bf16, fp8 = in_hbm.batch_1_tokens_per_s().values()
    assert (bf16, fp8) == (pytest.approx(193, rel=0.005), pytest.approx(212, rel=0.005))


PRINTED_TOKENS_PER_S = {
    "ktransformers-v0.2.1-dual-8": 14.7,
    "ktransformers-v0.2-single-8": 8.16,
    "ktransformers-v0.2-dual-8": 14.7,
    "ktransformers-v0.2.1-dual-6": 18.4,
    "ktransformers-v0.2-single-6": 10.5,
    "ktransformers-0.5.2-qwen3-30b": 61.4,
    "llamacpp-qwen3-30b": 38.2,
    "fiddler": 4.1,
}


@pytest.mark.parametrize("name", PRINTED_TOKENS_PER_S)
def test_cpu_offload(name):
    ours = cpu_offload.CASES[f"cpu-offload/{name}"].tokens_per_s()
    assert ours == pytest.approx(PRINTED_TOKENS_PER_S[name], rel=0.01)


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
    """The row every evaluation must contain, in tokens/s."""
    model = presets.model(name)
    widths = (16, 8, 4, 3, 2, 1)
    for system_name, printed in (("seed_sim", seed_sim), ("h100_seed_ndp", h100)):
        system = dataclasses.replace(presets.system(system_name), stored_bits=widths)
        step = cost.all_hbm_step_s(
            model, system, bits=bits, contexts=[1152], n_distinct=np.float64(model.top_k)
        )
        assert 1 / step == pytest.approx(printed, rel=0.005)
