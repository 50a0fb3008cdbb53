import tomllib
from importlib import resources

import pytest

from ndp_gym import cost, presets
from ndp_gym.specs import MLA

LOADERS = {
    "gpus": presets.gpu,
    "links": presets.link,
    "far": presets.far,
    "models": presets.model,
    "systems": presets.system,
    "formats": presets.fmt,
}


@pytest.mark.parametrize("kind", presets.KINDS)
def test_every_preset_loads_and_says_where_its_numbers_come_from(kind):
    assert presets.names(kind)
    for name in presets.names(kind):
        spec = LOADERS[kind](name)
        assert spec.name == name
        assert len(spec.source) > 20, f"{name} has no source"


@pytest.mark.parametrize("kind", presets.KINDS)
def test_assumed_names_fields_that_exist(kind):
    for name in presets.names(kind):
        spec = LOADERS[kind](name)
        for field in spec.assumed:
            assert hasattr(spec, field.split(".")[0].split("[")[0]), f"{name}: {field}"


def test_preset_files_hold_no_path_or_address():
    for kind in presets.KINDS:
        text = resources.files("ndp_gym.presets").joinpath(f"{kind}.toml").read_text()
        assert tomllib.loads(text)
        assert "://" not in text


@pytest.mark.parametrize(
    ("loader", "name", "message"),
    [
        (presets.model, "mixtral-8x7", "unknown model preset 'mixtral-8x7'.*mixtral-8x7b"),
        (presets.system, "seed", "unknown system preset 'seed'.*seed_sim"),
        (presets.gpu, "h100", "unknown gpu preset 'h100'.*h100_sxm"),
        (presets.far, "zzz", "unknown far preset 'zzz'; did you mean"),
        (presets.fmt, "mse", "unknown format preset 'mse'"),
        (presets.link, "pcie5", "unknown link preset 'pcie5'.*pcie5_x16"),
    ],
)
def test_unknown_names_suggest_near_ones(loader, name, message):
    with pytest.raises(ValueError, match=message):
        loader(name)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        presets.names("planets")


# Total and active parameters in 1e9, experts in 1e6; totals are the published ones.
MODELS = {
    "mixtral-8x7b": (46.70, 12.75, 176.2),
    "mixtral-8x22b": (140.62, 38.95, 302.0),
    "deepseek-v2-lite": (15.71, 2.45, 8.65),
    "deepseek-v3": (671.03, 36.62, 44.04),
    "qwen1.5-moe-a2.7b": (14.32, 2.38, 8.65),
    "qwen3-30b-a3b": (30.53, 3.04, 4.72),
    "qwen3-235b-a22b": (235.09, 21.57, 18.87),
    "olmoe-1b-7b": (6.92, 1.18, 6.29),
    "phi-3.5-moe": (41.87, 6.51, 78.6),
    "gpt-oss-20b": (20.91, 3.61, 24.9),
    "gpt-oss-120b": (116.79, 5.13, 24.9),
    "kimi-k2": (1026.4, 31.7, 44.04),
    "glm-4.5-air": (106.9, 12.8, 17.3),
    "llama4-scout": (107.8, 16.1, 125.8),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    model = presets.model(name)
    total, active, expert = MODELS[name]
    assert model.total_params / 1e9 == pytest.approx(total, rel=0.005)
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.005)
    assert model.expert_params / 1e6 == pytest.approx(expert, rel=0.005)


@pytest.mark.parametrize(
    ("name", "total"),
    [("granite-3.0-3b-a800m", 3.3), ("gemma-4-26b-a4b", 25.2), ("minimoe-16b", 16)],
)
def test_recalled_models_have_the_advertised_size(name, total):
    model = presets.model(name)
    assert model.total_params / 1e9 == pytest.approx(total, rel=0.025)
    assert model.assumed


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("deepseek-v2-lite", (26, 64, 6)),
        ("gpt-oss-120b", (36, 128, 4)),
        ("olmoe-1b-7b", (16, 64, 8)),
        ("qwen1.5-moe-a2.7b", (24, 60, 4)),
        ("granite-3.0-3b-a800m", (32, 40, 8)),
        ("gemma-4-26b-a4b", (30, 128, 6)),
        ("mixtral-8x7b", (32, 8, 2)),
        ("minimoe-16b", (8, 64, 6)),
    ],
)
def test_models_have_the_layers_experts_and_top_k_of_their_recordings(name, shape):
    model = presets.model(name)
    assert (model.n_layers, model.n_experts, model.top_k) == shape


def test_deepseek_v3_fits_the_large_device_only():
    model = presets.model("deepseek-v3")
    cost.check_capacity(model, presets.system("h100_structera"))
    with pytest.raises(ValueError, match="store fewer widths"):
        cost.check_capacity(model, presets.system("h100_cxl_pnm"))


@pytest.mark.shared
def test_recorded_expert_bytes_are_those_of_the_gemma_preset(shared_traces):
    """Gate and up in Q4_K (4.5 bit), down in Q5_0 (5.5) or Q8_0 (8.5)."""
    import gzip

    matches = sorted(shared_traces.rglob("gemma.route.csv.gz"))
    with gzip.open(matches[0], "rt", encoding="utf-8") as file:
        header = [line for line in file if line.startswith("# layer=")]
    recorded = {int(line.split("expert_bytes=")[1].split()[0]) for line in header}
    third = presets.model("gemma-4-26b-a4b").expert_params / 3
    assert recorded == {round(third * (2 * 4.5 + down) / 8) for down in (5.5, 8.5)}
    assert len(header) == presets.model("gemma-4-26b-a4b").n_layers


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("gguf_k", {8: 8.5, 6: 6.5625, 5: 5.5, 4: 4.5, 3: 3.4375, 2: 2.625}),
        ("mxfp4", {4: 4.25}),
        ("mse_g128", {16: 16, 8: 8, 4: 4.25, 3: 3.25, 2: 2.25, 1: 1.25}),
        ("hqq_g64", {8: 8.5, 4: 4.5, 3: 3.7, 2: 2.5}),
        ("rtn_g128", {8: 8.188, 4: 4.156, 3: 3.148, 2: 2.141, 1: 1.125}),
        ("rtn_g64", {8: 8.375, 4: 4.313, 3: 3.297, 2: 2.281}),
    ],
)
def test_stored_widths_are_those_of_real_formats(name, widths):
    """By arithmetic or from tensors of hqq; the GGUF rows are the constants of the gguf package."""
    for bits, stored in widths.items():
        assert presets.fmt(name).bits_per_weight[bits] == pytest.approx(stored, abs=6e-4)


def test_replica_set_of_the_seed():
    """16 + 4 + 3 + 2 + 1 are 26 bits per weight, 27 with 0.25 of metadata for each low width."""
    model = presets.model("mixtral-8x22b")
    stored = cost.stored_bytes(model, presets.system("seed_sim"))
    assert stored == model.routed_params * 27 // 8


@pytest.mark.parametrize("system_name", ["h100_cxl_pnm", "h100_fetch", "b200"])
@pytest.mark.parametrize("model_name", ["minimoe-16b", "mixtral-8x7b", "deepseek-v2-lite"])
def test_default_systems_hold_the_default_models(system_name, model_name):
    model, system = presets.model(model_name), presets.system(system_name)
    cost.check_capacity(model, system)
    assert cost.auto_budget_bytes(model, system, [2048] * 8, window=16) > 0


def test_default_budget_forces_a_choice():
    """A tenth of all 16-bit expert bytes holds no uniform width of the menu."""
    model, system = presets.model("minimoe-16b"), presets.system("h100_cxl_pnm")
    narrowest = cost.expert_bytes(model, system.format, system.stored_bits[-1])
    assert narrowest * model.n_layers * model.n_experts > 0.10 * model.routed_bytes16


def test_real_device_constants_differ_from_the_simulator():
    assert presets.system("seed_sim").gpu.layer_launch_s == 0
    assert presets.gpu("h100_sxm").layer_launch_s == pytest.approx(35e-6)
    assert presets.system("cpu_quad_ddr4_rtx2080").overlap == 0
    assert isinstance(presets.model("kimi-k2").attention, MLA)
