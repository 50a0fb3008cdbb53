import dataclasses
import pickle

import pytest

from ndp_gym import presets
from ndp_gym.specs import GQA, MLA, Format, MoESpec, Service


def tiny(**changes: object) -> MoESpec:
    fields: dict[str, object] = {
        "name": "tiny",
        "n_layers": 2,
        "hidden_size": 8,
        "expert_size": 16,
        "n_experts": 4,
        "top_k": 2,
        "vocab_size": 10,
        "attention": GQA(n_heads=2, n_kv_heads=1, head_dim=4),
    }
    return MoESpec(**(fields | changes))  # type: ignore[arg-type]


def test_sizes_follow_from_the_shape_by_hand():
    model = tiny(shared_size=4, n_dense_layers=1, dense_size=32)
    assert model.expert_params == 3 * 8 * 16
    assert model.attention_params == 8 * (2 + 2) * 4 + 2 * 4 * 8
    assert model.kv_bytes_per_token_layer == 2 * 1 * 4 * 2  # K and V, one head of 4, 2 bytes
    assert model.n_all_layers == 3
    routed_layers = 2 * (8 * 4 + 3 * 8 * 4)
    assert model.dense_params == 3 * 192 + routed_layers + 3 * 8 * 32 + 2 * 10 * 8
    assert model.dense_bytes == 2 * model.dense_params
    assert model.routed_bytes16 == 2 * 2 * 4 * 384


def test_mla_weights_and_cache_by_hand():
    mla = MLA(n_heads=2, q_lora_rank=3, kv_lora_rank=4, nope_dim=5, rope_dim=6, v_dim=7)
    query = 10 * 3 + 3 * 2 * 11
    assert mla.params(10) == query + 10 * 10 + 4 * 2 * 12 + 2 * 7 * 10
    full_query = dataclasses.replace(mla, q_lora_rank=0)
    assert full_query.params(10) == mla.params(10) - query + 10 * 2 * 11
    assert mla.kv_bytes == 20
    assert mla.decode_flops == 2 * 2 * (8 + 6)


def test_tied_embedding_is_stored_once_and_still_read():
    model = tiny()
    tied = dataclasses.replace(model, tied_embedding=True)
    assert model.dense_params - tied.dense_params == 80
    assert tied.active_params == model.active_params


def test_every_second_layer_is_full():
    model = tiny(n_layers=4, sliding_window=5, full_attention_every=2)
    assert model.sliding_layers == (True, False, True, False)
    assert tiny(full_attention_every=2).sliding_layers == (False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k must be in 1..n_experts=4, got 5"),
        ({"hidden_size": 0}, "hidden_size must be finite and > 0, got 0"),
        ({"n_dense_layers": 1}, "dense_size must be > 0"),
        ({"gate_profile": (1.0,)}, "gate_profile must have top_k=2 entries, got 1"),
        ({"layer_weights": (1.0, 1.0, 1.0)}, "layer_weights must have n_layers=2 entries, got 3"),
        ({"layer_weights": (0.0, 0.0)}, "sum_of_layer_weights"),
        ({"super_experts": ((2, 0),)}, r"super_experts must lie in .* got \(2, 0\)"),
        ({"sliding_window": -1}, "sliding_window must be finite and >= 0"),
    ],
)
def test_a_model_that_disagrees_with_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_heads_must_divide_into_groups():
    with pytest.raises(ValueError, match="multiple of n_kv_heads=3, got 4"):
        GQA(n_heads=4, n_kv_heads=3, head_dim=8)


def test_format_tables_must_cover_the_same_widths():
    with pytest.raises(ValueError, match=r"rel_mse must cover the bitwidths \[4\], got \[8\]"):
        Format(name="x", bits_per_weight={4: 4.25}, rel_mse={8: 0.0}, kernel={4: "int4"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 1.5}, r"overlap must be in \[0, 1\], got 1.5"),
        ({"stored_bits": (3, 4)}, "distinct and descending"),
        ({"stored_bits": ()}, "distinct and descending"),
        ({"stored_bits": (5,)}, "bitwidths of format 'mse_g128'"),
        ({"engine_base_s": float("nan")}, "engine_base_s must be finite"),
        ({"format": presets.fmt("mxfp4"), "stored_bits": (8,)}, "bitwidths of format 'mxfp4'"),
    ],
)
def test_a_system_that_cannot_exist_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.system("seed_sim"), **changes)


def test_a_gpu_without_the_kernel_of_a_width_is_refused():
    system = presets.system("seed_sim")
    gpu = dataclasses.replace(system.gpu, moe_kernels={"bf16": system.gpu.moe_kernels["bf16"]})
    with pytest.raises(ValueError, match="must have the MoE kernel of 4 bit"):
        dataclasses.replace(system, gpu=gpu)


def test_far_device_that_computes_needs_compute():
    far = presets.far("host_dram")
    with pytest.raises(ValueError, match="flops_per_s must be finite and > 0"):
        dataclasses.replace(far, can_compute=True)


def test_service_follows_the_far_device():
    assert presets.system("seed_sim").default_service == Service(kind="in_place")
    assert presets.system("h100_fetch").default_service == Service(kind="fetch")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "guess"}, "kind must be one of"),
        ({"kind": "fetch", "cache": "mru"}, "cache must be one of"),
        ({"kind": "fetch", "scope": "row"}, "scope must be one of"),
        ({"kind": "in_place", "cache": "lru"}, "keeps no cache"),
    ],
)
def test_services_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Service(**fields)


def test_specs_are_hashable_and_survive_pickling():
    system, model = presets.system("h100_cxl_pnm"), presets.model("deepseek-v3")
    for spec in (system, model, system.default_service):
        copy = pickle.loads(pickle.dumps(spec))
        assert copy == spec
        assert hash(copy) == hash(spec)
