"""Exported plans: one placement of many windows, and each engine's file read as the engine does."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndp_gym.cli import main
from ndp_gym.commands.plan import FORMATS
from ndp_gym.importers.popularity import load_profile
from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.plan_export import ExportedPlan, decide, read_plan
from ndp_gym.plan_targets import TARGETS, gpu_ratio, ordered_counts
from ndp_gym.policy import PolicyContext
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM


class Scripted:
    """Pins given experts (layer, expert, bits) in every window, the last entry from then on."""

    def __init__(self, windows: Sequence[Sequence[tuple[int, int, int]]]) -> None:
        self._windows = windows

    def reset(self, context: PolicyContext) -> None:
        self._next = 0

    def __call__(self, observation: Any) -> Plan:
        tier, bits = np.full((2, 4), FAR), np.full((2, 4), 2)
        for layer, expert, width in self._windows[min(self._next, len(self._windows) - 1)]:
            tier[layer, expert], bits[layer, expert] = HBM, width
        self._next += 1
        return Plan(placement=Placement(tier=tier, bitwidth=bits))


def decided(windows: Sequence[Sequence[tuple[int, int, int]]], **options: Any) -> ExportedPlan:
    return decide(
        Scripted(windows), make_trace(), MODEL, SYSTEM, batch_size=2, window=4,
        hbm_budget=options.pop("hbm_budget", 24_000), max_windows=len(windows), **options,
    )  # fmt: skip


WINDOWS = (
    [(0, 0, 4), (0, 1, 4), (1, 3, 8)],
    [(0, 0, 8), (0, 1, 4)],
    [(0, 0, 8), (1, 2, 16)],
)


def test_the_majority_is_what_most_windows_have_at_their_most_frequent_width() -> None:
    plan = decided(WINDOWS)
    assert plan.placement.tier.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert plan.placement.bitwidth.tolist() == [[8, 4, 2, 2], [2, 2, 2, 2]]
    np.testing.assert_allclose(plan.share, np.array([[3, 2, 0, 0], [0, 0, 1, 1]]) / 3)
    assert plan.facts["n_windows"] == 3
    assert plan.facts["hbm_bytes"] == 6000 + 3000
    np.testing.assert_allclose(plan.load.sum(axis=1), 2)


def test_the_last_plan_is_that_of_the_last_window() -> None:
    plan = decided(WINDOWS, at="last")
    assert plan.placement.tier.tolist() == [[0, 1, 1, 1], [1, 1, 0, 1]]
    assert plan.placement.bitwidth.tolist() == [[8, 2, 2, 2], [2, 2, 16, 2]]
    with pytest.raises(ValueError, match="at must be one of majority, last"):
        decided(WINDOWS, at="first")


def test_a_majority_that_does_not_fit_leaves_out_the_smallest_share() -> None:
    windows = [
        [(0, 0, 16), (0, 1, 4), (0, 2, 4)],
        [(0, 0, 16), (0, 1, 4), (0, 3, 4)],
        [(0, 0, 16), (0, 2, 4), (0, 3, 4)],
    ]
    plan = decided(windows, hbm_budget=12_000 + 2 * 3000)
    load = plan.load[0]
    kept = np.flatnonzero(plan.placement.tier[0] == HBM)
    assert kept.tolist() == sorted([0, *sorted([1, 2, 3], key=lambda e: -load[e])[:2]])
    assert plan.facts["hbm_bytes"] <= plan.facts["hbm_budget_bytes"]


def exported(tier: Any, bits: Any = 4, first_layer: int = 0, **facts: Any) -> ExportedPlan:
    tier = np.array(tier)
    load = np.random.default_rng(3).random(tier.shape) * 0.3
    return ExportedPlan(
        placement=Placement(tier=tier, bitwidth=np.broadcast_to(bits, tier.shape)),
        share=1.0 - tier,
        load=load,
        first_layer=first_layer,
        facts={"policy": "p", "service": {"kind": "in_place"}, **facts},
    )


MIXED = exported([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]], [[8, 4, 4, 4]], first_layer=1)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    for plan in (MIXED, decided(WINDOWS)):
        path = tmp_path / "p.json"
        content = TARGETS["json"].write(plan).content
        assert isinstance(content, str)
        path.write_text(content)
        again = read_plan(path)
        np.testing.assert_array_equal(again.placement.tier, plan.placement.tier)
        np.testing.assert_array_equal(again.placement.bitwidth, plan.placement.bitwidth)
        np.testing.assert_array_equal(again.share, plan.share)
        np.testing.assert_array_equal(again.load, plan.load)
        assert (again.first_layer, again.facts) == (plan.first_layer, plan.facts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": "ndp-gym plan 1"', '"format": "x"', "must be a plan of"),
        ('"tier": [0, 1, 1, 1]', '"tier": [0, 1, 7, 1]', r"tier must be 0 \(HBM\) or 1"),
        ('"tier": [0, 1, 1, 1]', '"tier": [0, 1]', "regular array"),
        ('"bits": [8, 4, 4, 4]', '"bits": "8"', "regular array"),
        ('"layer": 2', '"layer": 9', "layers must ascend by 1"),
        ('"layers": [', '"layers": [3, ', "must be a list of objects"),
        ("{", "[", "not valid JSON"),
    ],
)
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.json"
    content = TARGETS["json"].write(MIXED).content
    assert isinstance(content, str)
    path.write_text(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).count("bad.json") == 1


def test_sglang_counts_put_the_hot_experts_first_in_every_layer(tmp_path: Path) -> None:
    written = TARGETS["sglang"].write(MIXED)
    assert isinstance(written.content, str)
    counts = np.array(json.loads(written.content)["logical_count"])
    assert counts.shape == (4, 4)
    assert not counts[0].any()  # the dense layer
    near = MIXED.placement.tier == HBM
    assert counts[1:][near].min() > counts[1:][~near].max()
    for layer in range(3):
        for group in (near[layer], ~near[layer]):
            order = np.argsort(MIXED.load[layer][group])
            assert (np.diff(counts[1 + layer][group][order]) > 0).all()
    path = tmp_path / "counts.json"
    path.write_text(written.content)
    model = replace(MODEL, n_layers=3, n_dense_layers=1, dense_size=8)
    ranked = np.argsort(-load_profile(path, model).load[1])
    assert set(ranked[:2]) == {1, 2}
    assert any("tiers: SGLang keeps every expert on some GPU" in t for t in written.left_out)


@pytest.mark.parametrize("seed", range(5))
def test_ktransformers_puts_exactly_the_planned_experts_on_the_gpu(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = exported(rng.integers(0, 2, (5, 16)), rng.choice([4, 8], (5, 16)), first_layer=2)
    written = TARGETS["ktransformers"].write(plan)
    assert isinstance(written.content, bytes)
    loaded = torch.load(io.BytesIO(written.content), weights_only=True)["logical_count"]
    assert loaded.shape == (1, 7, 16)
    ratio = float(re.findall(r"--kt-gpu-experts-ratio (\S+)", written.usage)[0])
    frequency = loaded.sum(dim=0).float().view(-1)  # what kt-kernel's frequency strategy does
    mask = torch.zeros(frequency.numel(), dtype=torch.bool)
    mask[torch.topk(frequency, k=int(5 * 16 * ratio), sorted=False).indices] = True
    np.testing.assert_array_equal(mask.view(7, 16)[2:].numpy(), plan.placement.tier == HBM)
    odd = re.findall(r"(\d+) of 80 experts", " ".join(written.left_out))
    tiers = [plan.placement.bitwidth[plan.placement.tier == t] for t in (HBM, FAR)]
    assert int(odd[0]) == sum(min((b == 4).sum(), (b == 8).sum()) for b in tiers)


def test_the_gpu_ratio_gives_the_number_back() -> None:
    for total in (1, 2, 7, 64, 512, 15360):
        for n_near in {0, 1, total // 3, total - 1, total}:
            assert int(total * float(gpu_ratio(n_near, total))) == n_near


def tensor_names(n_layers: int) -> list[str]:
    """Names that a GGUF of an MoE model may hold."""
    parts = ("up", "gate", "down", "gate_up")
    names = ["token_embd.weight", "output.weight"]
    for layer in range(n_layers):
        names += [
            f"blk.{layer}.ffn_{part}_exps.{end}" for part in parts for end in ("weight", "bias")
        ]
        names += [f"blk.{layer}.ffn_{part}_shexp.weight" for part in parts[:3]]
        names += [f"blk.{layer}.ffn_{part}.weight" for part in parts[:3]]
        names += [f"blk.{layer}.{name}.weight" for name in ("ffn_gate_inp", "attn_q", "attn_norm")]
    return names


def test_llama_cpp_moves_the_experts_of_the_planned_layers_and_nothing_else() -> None:
    tier = np.zeros((30, 4), dtype=np.int64)
    far = [1, 2, 10, 11, 29]
    tier[far] = 1
    written = TARGETS["llama-cpp"].write(exported(tier, first_layer=3))
    assert isinstance(written.content, str)
    pattern, _, buffer = written.content.strip().rpartition("=")
    assert buffer == "CPU"
    assert "," not in pattern  # commas separate overrides
    moved = [name for name in tensor_names(35) if re.search(pattern, name)]
    expected = {f"blk.{layer + 3}." for layer in far}
    assert moved == [
        name
        for name in tensor_names(35)
        if "_exps." in name and any(name.startswith(prefix) for prefix in expected)
    ]
    assert not any("part of a layer" in text for text in written.left_out)


def test_llama_cpp_lists_split_layers_and_refuses_where_there_is_nothing_else() -> None:
    split = exported([[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    written = TARGETS["llama-cpp"].write(split)
    assert written.content == "^blk\\.(1|2)\\.ffn_(up|down|gate|gate_up)_exps\\.=CPU\n"
    (text,) = [text for text in written.left_out if "part of a layer" in text]
    assert "layers 1 are split" in text
    assert "1 of 5 experts in HBM (20.0%)" in text
    with pytest.raises(ValueError, match="2 of 3 layers of this plan are split"):
        TARGETS["llama-cpp"].write(MIXED)
    assert TARGETS["llama-cpp"].write(exported(np.zeros((2, 4)))).content == ""
    assert "(0|1)" in str(TARGETS["llama-cpp"].write(exported(np.ones((2, 4)))).content)


def test_what_serves_a_miss_is_said_where_the_file_cannot() -> None:
    plan = exported([[0, 1], [1, 1]], service={"kind": "fetch", "cache": "lru"})
    for name in ("sglang", "ktransformers"):
        assert any(
            "by fetch through a cache (lru)" in t for t in TARGETS[name].write(plan).left_out
        )


def test_counts_stay_exact_in_float32() -> None:
    counts = ordered_counts(exported(np.random.default_rng(0).integers(0, 2, (60, 256))))
    np.testing.assert_array_equal(counts.astype(np.float32).astype(np.int64), counts)


def test_the_formats_offered_are_those_that_exist() -> None:
    assert tuple(TARGETS) == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_writes_whole_files_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / f"plan{TARGETS[name].suffix}"
    arguments = ["plan", "export", "--policy", "kt_front", "--format", name, "--out", str(out)]
    assert main([*arguments, "--max-windows", "2", "--hbm-budget", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert ("not expressed: bits" in printed) == (name != "json")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    before = out.read_bytes()
    bad = ["--policy", "balance"] if name == "llama-cpp" else ["--model", "mixtral-8x7b"]
    assert main([*arguments, "--max-windows", "2", *bad]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--format", "ktransformers", "--out", "x.json"], "--out must end in .pt"),
        (["--format", "sglang", "--out", "x.pt"], "--out must end in .json"),
        (["--format", "json", "--out", "x", "--seed", "-1"], "--seed must be >= 0"),
        (["--format", "json", "--out", "x", "--policy", "nobody"], "'nobody' is unknown"),
    ],
)
def test_bad_wishes_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, extra: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "export", "--policy", "ema", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
