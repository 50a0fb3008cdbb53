"""Ranges of uncertain constants, and what they say about the order of policies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import cli, presets
from ndp_gym.cost import cost_table
from ndp_gym.evaluation import evaluate
from ndp_gym.quality import QualityModel
from ndp_gym.report import print_tables
from ndp_gym.results import EvaluationResult
from ndp_gym.uncertainty import Constant, Score, Study, applied, constants_of, study
from tests.conftest import make_trace
from tests.sample_results import sample_row
from tests.toy import MODEL, SYSTEM

NOMINAL_IN = {"factor": 1.0, "added": 0.0}


@pytest.mark.parametrize("name", presets.names("systems"))
def test_every_preset_lies_inside_its_ranges_and_both_ends_are_systems(name: str) -> None:
    system, quality = presets.system(name), QualityModel()
    found = constants_of(system)
    assert len({c.name for c in found}) == len(found) >= 4
    for constant in found:
        floor = system.far.floor_s
        nominal = {**NOMINAL_IN, "value": quality.kappa if constant.name == "kappa" else floor}
        assert constant.low <= nominal[constant.kind] <= constant.high, constant.name
        assert len(constant.source) > 40
        ends = [{constant.name: constant.at(share)} for share in (0.0, 1.0)]
        assert applied(ends[0], system, quality) != applied(ends[1], system, quality)


def test_nothing_changed_costs_what_it_did() -> None:
    system = presets.system("h100_cxl_pnm")
    model = presets.model("mixtral-8x7b")
    sampled, quality = applied({}, system, QualityModel())
    for before, after in zip(cost_table(model, system), cost_table(model, sampled), strict=True):
        np.testing.assert_array_equal(before, after)
    assert quality == QualityModel()


def test_constants_move_what_their_equation_says() -> None:
    """Equations of docs/model.md: who divides by what."""
    system = replace(presets.system("h100_cxl_pnm"), engine_token_s=50e-6)
    model = presets.model("mixtral-8x7b")
    before = cost_table(model, system)
    values = {
        "far_efficiency": 0.5,
        "link_bandwidth": 0.5,
        "kernel_efficiency_3": 0.5,
        "format_overhead": 0.25,
        "far_floor": 60e-6,
        "engine_token": 1.2,
        "kappa": 4.0,
    }
    sampled, quality = applied(values, system, QualityModel())
    after = cost_table(model, sampled)
    grown = np.array([1, 1, 4.5 / 4.25, 3.5 / 3.25, 2.5 / 2.25])  # 16, 8, 4, 3, 2 bit
    np.testing.assert_allclose(after.weight_bytes / before.weight_bytes, grown, rtol=1e-7)
    np.testing.assert_allclose(after.far_weight_s / before.far_weight_s, 2 * grown, rtol=1e-7)
    np.testing.assert_allclose(after.copy_s / before.copy_s, 2 * grown, rtol=1e-7)
    slower = np.array([1, 1, 1, 2, 1])
    np.testing.assert_allclose(after.gpu_weight_s / before.gpu_weight_s, slower * grown, rtol=1e-7)
    assert after.far_floor_s == 60e-6
    assert after.engine_token_s == pytest.approx(60e-6)
    assert quality.kappa == 4.0


def test_formats_that_state_their_width_have_no_uncertain_overhead() -> None:
    names = {c.name for c in constants_of(presets.system("h100_mxfp4"))}
    assert "format_overhead" not in names
    assert "kernel_efficiency_4" in names


def test_plain_storage_has_no_far_constants() -> None:
    system = replace(SYSTEM, far=replace(presets.far("host_dram"), memory_bytes=10**6))
    assert not {c.name for c in constants_of(system)} & {"far_efficiency", "far_floor"}


def constant(name: str, low: float, high: float) -> Constant:
    return Constant(
        name=name, symbol=name, kind="factor", scale="log", low=low, high=high, source="made up"
    )


def test_flips_are_found_and_blamed_on_the_constant_that_causes_them() -> None:
    """B is ahead where x > 2 (a third of 1..8 on a log scale is below 2); y changes nothing."""

    def scores(values: Mapping[str, float]) -> dict[str, Score]:
        x = values.get("x", 1.5)
        return {
            "a": Score(2.0, 10.0),
            "b": Score(float(x), 5.0),
            "never": Score(-1.0 - 0.1 * values.get("y", 1.0), 1.0),
        }

    pairs = study([constant("x", 1.0, 8.0), constant("y", 0.5, 2.0)], scores, n_samples=300)
    assert [(p["a"], p["b"]) for p in pairs] == [("a", "b"), ("a", "never"), ("b", "never")]
    first, second, _ = pairs
    assert first["p_a_beats_b"] == pytest.approx(1 / 3, abs=0.01)
    assert first["p_a_faster"] == 1
    assert first["flips"]
    assert [(f["constant"], f["value"]) for f in first["flipped_by"]] == [("x", 8.0)]
    assert first["strongest"] == "x"
    assert first["rank_correlation"] == pytest.approx(-1)
    assert not second["flips"]
    assert second["p_a_beats_b"] == 1


def test_what_is_infeasible_loses_and_two_of_them_tie() -> None:
    def scores(values: Mapping[str, float]) -> dict[str, Score]:
        if not values:
            return {"a": Score(1.0, 1.0), "b": Score(0.5, 1.0)}
        return {"b": Score(0.5, 1.0)} if values["x"] > 2 else {}

    (pair,) = study([constant("x", 1.0, 4.0)], scores, n_samples=10)
    assert pair["p_a_beats_b"] == pytest.approx(0.25)  # half lost, half tied
    assert pair["flipped_by"][0]["reward_difference"] is None
    json.dumps(pair, allow_nan=False)


def test_samples_are_seeded_and_spread_evenly() -> None:
    seen: list[Mapping[str, float]] = []

    def scores(values: Mapping[str, float]) -> dict[str, Score]:
        seen.append(values)
        return {"a": Score(1.0, 1.0)}

    two = [constant("x", 1.0, 16.0), constant("y", 1.0, 16.0)]
    for _ in range(2):
        study(two, scores, n_samples=4, seed=3)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    for name in "xy":
        quarters = sorted(int(np.log2(values[name])) for values in seen[1:5])
        assert quarters == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="n_samples must be >= 1"):
        study(two, scores, n_samples=0)


def test_evaluation_marks_rows_whose_order_flips_and_plans_with_the_sample() -> None:
    result = evaluate(
        ["balance", "ema"], make_trace(), MODEL, SYSTEM, hbm_budget=24_000, batch_sizes=(2,),
        window=4, uncertainty=3,
    )  # fmt: skip
    (found,) = result.to_dict()["uncertainty"]
    assert {"far_efficiency", "kappa"} <= {c["name"] for c in found["constants"]}
    assert found["n_samples"] == 3
    assert len(found["pairs"]) == 10
    for row in result:
        expected = {
            pair["a"] if pair["b"] == row["policy"] else pair["b"]
            for pair in found["pairs"]
            if pair["flips"] and row["policy"] in (pair["a"], pair["b"])
        }
        assert set(row["order_flips_with"] or ()) == expected
    assert evaluate("ema", make_trace(), MODEL, SYSTEM, hbm_budget=24_000).rows[0][
        "order_flips_with"
    ] is None  # fmt: skip


def test_table_says_how_sure_and_what_flips(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        sample_row("good", order_flips_with=["fair"]),
        sample_row("fair", reward=-0.1, order_flips_with=["good"]),
    ]

    def scores(values: Mapping[str, float]) -> dict[str, Score]:
        return {"good": Score(0.0, 1.0), "fair": Score(values.get("x", 0.9) - 1.0, 1.0)}

    constants = [constant("x", 0.5, 2.0)]
    pairs = study(constants, scores, n_samples=8)
    found = Study(
        trace=rows[0]["trace"],
        model=rows[0]["model"],
        system=rows[0]["system"],
        batch_size=rows[0]["batch_size"],
        window=rows[0]["window"],
        n_samples=8,
        seed=0,
        plans="policies plan",
        constants=[{}],
        pairs=pairs,
    )
    print_tables(EvaluationResult(rows=rows, uncertainty=[found]), width=150)
    text = capsys.readouterr().out
    order = next(line.split() for line in text.splitlines() if line.split()[-3:] == ["x", "x", "2"])
    assert order[:2] == ["good", "0.50"]
    assert any(line.rstrip().endswith("~") for line in text.splitlines() if " fair" in line)


def test_command_takes_a_number_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "small.safetensors", tmp_path / "rows.json"
    make_trace(n_layers=8, n_experts=64, top_k=6, n_conversations=16).save(path)
    argv = f"evaluate --trace {path} --model minimoe-16b --policies ema --max-windows 2"
    assert cli.main([*argv.split(), "--uncertainty", "2", "--json", str(out)]) == 0
    assert "2 samples of" in capsys.readouterr().out
    assert json.loads(out.read_text())["uncertainty"][0]["pairs"]
    assert cli.main([*argv.split(), "--uncertainty", "-1"]) == 2
