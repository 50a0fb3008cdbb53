"""What reports show and write, from hand-made rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ndp_gym.report import print_tables, write_csv, write_json, write_latex, write_png
from ndp_gym.results import (
    EvaluationResult,
    all_hbm_winner,
    at_quality,
    better_all_hbm,
    pareto_front,
)
from tests.sample_results import infeasible_row, sample_result, sample_row


def test_pareto_front_keeps_only_rows_that_nothing_beats() -> None:
    # c is as lossy as b and slower; d is lossier than b and no faster; e could not run
    points = {"a": (10, 0.01), "b": (20, 0.02), "c": (15, 0.02), "d": (20, 0.5), "f": (30, 0.6)}
    rows = [
        sample_row(name, tokens_per_s=float(speed), delta_nll_nats=loss)
        for name, (speed, loss) in points.items()
    ]
    assert [r["policy"] for r in pareto_front([*rows, infeasible_row("e")])] == ["a", "b", "f"]


def test_throughput_at_quality_is_null_over_the_budget_and_groups_variants() -> None:
    rows = [
        sample_row("all_far4", tokens_per_s=100.0, delta_nll_nats=0.026),
        sample_row("all_far3", tokens_per_s=130.0, delta_nll_nats=0.1),
        sample_row("cost_aware", tokens_per_s=150.0, delta_nll_nats=0.12),
        infeasible_row("all_hbm"),
    ]
    found = {(e["policy"], e["delta_nll_budget"]): e for e in at_quality(rows)}
    assert found["all_far4", 0.01]["tokens_per_s"] is None
    assert found["all_far4", 0.03]["tokens_per_s"] == 100.0
    assert found["all_far*", 0.03]["achieved_by"] == "all_far4"
    assert found["all_far*", 0.1]["tokens_per_s"] == 130.0  # a loss equal to the budget counts
    assert found["best", 0.1]["achieved_by"] == "all_far3"
    assert found["all_hbm", 0.1]["tokens_per_s"] is None
    assert "cost_aware*" not in {policy for policy, _ in found}


def test_placement_is_unnecessary_only_where_an_all_hbm_row_has_the_best_reward() -> None:
    far = sample_row("cost_aware", reward=0.4)
    fast_and_bad = sample_row("all_hbm", tokens_per_s=900.0, reward=-2.0)
    mixed = sample_row("all_hbm_mixed", tokens_per_s=800.0, reward=0.5)
    assert all_hbm_winner([far, fast_and_bad]) is None
    winner = all_hbm_winner([far, fast_and_bad, mixed])
    assert winner is not None
    assert winner["policy"] == "all_hbm_mixed"
    faster = better_all_hbm([far, fast_and_bad, mixed])
    assert faster is not None
    assert faster["policy"] == "all_hbm"
    assert better_all_hbm([far, infeasible_row("all_hbm")]) is None


@pytest.mark.parametrize("width", [100, 120, 160])
def test_table_fits_its_width_and_says_modeled(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    print_tables(sample_result(), width=width)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "modeled, not measured" in text
    cost_aware = next(line for line in lines if line.strip().startswith("cost_aware"))
    assert cost_aware.split()[1:4] == ["150", "90..112", "1.00"]
    assert "…" not in text
    assert ("p99 ms" in text) == (width >= 112)
    assert ("J/tok unvalidated" in text) == (width >= 130)


def test_table_explains_flags_and_infeasible_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(sample_result(), width=140)
    text = capsys.readouterr().out
    assert "all_far2: extrapolated: mean bits <= 2" in text
    assert "all_hbm: infeasible: needs 12.0 GB, budget 8.0 GB" in text
    assert "best at ΔNLL <= 0.01 nats: no row" in text
    assert "best at ΔNLL <= 0.03 nats: 150 tok/s, cost_aware" in text
    assert "placement unnecessary" not in text


def test_table_says_where_placement_is_unnecessary(capsys: pytest.CaptureFixture[str]) -> None:
    winner = sample_row("all_hbm", reward=1.0, notes=["placement unnecessary here"])
    print_tables(EvaluationResult(rows=[sample_row("all_far4"), winner]))
    text = capsys.readouterr().out
    assert "placement unnecessary here: all_hbm has the highest reward" in text
    assert text.count("placement unnecessary") == 1


def test_json_holds_the_public_fields_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(sample_result(), path)
    document = json.loads(path.read_text())
    assert set(document) == {"rows", "at_quality", "provenance", "uncertainty"}
    assert document["rows"][2]["tokens_per_s_ci95"] == [90.0, 112.0]
    assert document["rows"][3]["speedup_vs_all_hbm"] is None
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]  # no temporary left


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(EvaluationResult(rows=[sample_row("a", ttft_s=float("nan"))]), path)
    path.unlink()
    path.mkdir()  # a rename onto a folder fails
    with pytest.raises(OSError, match=r"result\.json"):
        write_json(sample_result(), path)
    assert list(tmp_path.iterdir()) == [path]


def test_csv_has_one_row_each_and_splits_intervals(tmp_path: Path) -> None:
    write_csv(sample_result(), tmp_path / "result.csv")
    rows = list(csv.DictReader((tmp_path / "result.csv").read_text().splitlines()))
    assert [r["policy"] for r in rows] == ["all_far4", "all_far2", "cost_aware", "all_hbm"]
    assert (rows[0]["tokens_per_s_ci95_low"], rows[0]["tokens_per_s_ci95_high"]) == (
        "90.0",
        "112.0",
    )
    assert rows[3]["tokens_per_s_ci95_low"] == rows[3]["tokens_per_s"] == ""
    assert json.loads(rows[0]["env_spec"]) == {"id": "NDPPlacement-v0"}


def test_latex_escapes_names_and_sets_minus_signs(tmp_path: Path) -> None:
    write_latex(sample_result(), tmp_path / "result.tex")
    text = (tmp_path / "result.tex").read_text()
    assert r"all\_far2$^{*}$ & 180 & 170--195 & 1.80" in text
    assert "$-0.670$" in text
    row_lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in row_lines}) == 1


def test_png_is_drawn_without_pyplot(tmp_path: Path) -> None:
    import sys

    write_png(sample_result(), tmp_path / "result.png")
    data = (tmp_path / "result.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 1000  # pixels across
    assert "matplotlib.pyplot" not in sys.modules


def test_empty_results_can_be_written(tmp_path: Path) -> None:
    empty = EvaluationResult(rows=[])
    for write in (write_json, write_csv, write_latex, write_png):
        write(empty, tmp_path / write.__name__)
    assert at_quality([]) == []


def test_policies_that_see_the_future_are_neither_best_nor_beat_the_all_hbm_row() -> None:
    rows = [
        sample_row("all_hbm", reward=0.3, tokens_per_s=120.0),
        sample_row("oracle_hot", reward=0.9, tokens_per_s=200.0, sees_future=True),
        sample_row("ema", reward=0.2, tokens_per_s=110.0),
    ]
    best = [e for e in at_quality(rows) if e["policy"] == "best" and e["delta_nll_budget"] == 0.03]
    assert best[0]["achieved_by"] == "all_hbm"
    winner = all_hbm_winner(rows)
    assert winner is not None
    assert winner["policy"] == "all_hbm"


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_no_cell_is_cut_off_whatever_the_width(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    print_tables(sample_result(), width=width)
    table = capsys.readouterr().out
    assert "…" not in table.split("modeled")[0]
    assert "ΔNLL" in table


def test_a_note_of_every_row_that_ran_is_not_listed_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [sample_row("a", notes=["few"]), sample_row("b", notes=["few"]), infeasible_row("c")]
    print_tables(EvaluationResult(rows=rows), width=120)
    text = capsys.readouterr().out
    assert "  all rows: few" in text
    assert "  c: infeasible: needs" in text
