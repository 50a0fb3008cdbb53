"""`ndp-gym evaluate`: what it takes, writes and says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

from ndp_gym import cli
from ndp_gym.commands.evaluate import parse_budget, parse_policies
from ndp_gym.evaluation import evaluate
from policies import SAME_RULES
from tests.conftest import make_trace


def test_policy_options_may_hold_commas() -> None:
    assert parse_policies("lru,a:x=1,y=2, balance") == ["lru", "a:x=1,y=2", "balance"]
    assert parse_policies("lru,lru") == ["lru"]
    assert set(parse_policies("all")) > {"all_far4", "lru", "random"}
    with pytest.raises(ValueError, match="names separated by commas"):
        parse_policies("lru,,ema")


def test_all_lists_each_plan_once_and_the_other_names_stay() -> None:
    names = parse_policies("all")
    assert not SAME_RULES.keys() & set(names)
    assert set(SAME_RULES.values()) <= set(names)
    assert {"kt_front", "kt_uniform"} <= set(names)
    result = evaluate([*SAME_RULES, *SAME_RULES.values()], max_windows=3)
    rows = {row["policy"]: row for row in result.rows}
    for name, other in SAME_RULES.items():
        ours, theirs = rows[name], rows[other]
        assert (ours["tokens_per_s"], ours["reward"]) == (theirs["tokens_per_s"], theirs["reward"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            ("auto", "auto"),
            ("0.1", 0.1),
            ("8000000", 8_000_000),
            ("0", 0),
            ("1.0", 1.0),
            ("1KB", 1000),
            ("8GB", 8 * 10**9),
        ),
        *(("1.5GiB", 3 * 2**29), ("-1", -1)),
    ],
)
def test_budget_is_a_share_or_bytes(text: str, expected: object) -> None:
    assert parse_budget(text) == expected
    assert type(parse_budget(text)) is type(expected)


def test_command_line_writes_everything_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.safetensors"
    make_trace(n_layers=8, n_experts=64, top_k=6, n_conversations=16).save(path)
    out = tmp_path / "out"
    argv = f"evaluate --trace {path} --model minimoe-16b --policies ema --batch-size 1,2"
    assert cli.main([*argv.split(), "--max-windows", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    names = ["evaluation.csv", "evaluation.json", "evaluation.png", "evaluation.tex"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert all(f"wrote {out / name}" in text for name in names)
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [(r["policy"], r["batch_size"]) for r in rows][3:5] == [("ema", 1), ("all_far4", 2)]
    assert "small | minimoe-16b on h100_cxl_seed_ndp | batch 1, window 16" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "lrru"], "lru"),
        (["--batch-size", "1,x"], "--batch-size must be numbers"),
        (["--seeds", "0"], "--seeds must be >= 1"),
        (["--batch-size", "1000000000000"], "--batch-size 1000000000000 and --window 16 need"),
        (["--max-windows", "0"], "--max-windows must be >= 1, got 0"),
        (["--max-windows", "-1"], "--max-windows must be >= 1, got -1"),
        (["--hbm-budget", "much"], "--hbm-budget must be a share"),
        (["--hbm-budget", "1"], "--hbm-budget 1 means 1 B: write a share with a point (0.1, 1.0)"),
        (["--hbm-budget", "999999"], "bytes with a unit (999999GB, 999999KB)"),
        (["--hbm-budget", "infGB"], "--hbm-budget must be a share"),
        (["--hbm-budget", "-1"], "hbm_budget must be >= 0 bytes, got -1"),
        (["--model", "minimoe-16b,"], "--model must be names separated by commas"),
        (["--json", "/"], "/: Is a directory"),
        (["--json", "/dev/null/x.json"], "/dev/null: Not a directory"),
        (["--system", "h1000"], "h100"),
        (["--quality-weight", "great"], "quality_weight"),
        (["--trace", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_bad_command_lines_get_one_sentence_and_exit_code_two(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.safetensors"
    make_trace(n_layers=8, n_experts=64, top_k=6).save(path)
    argv = ["evaluate", "--trace", str(path), "--model", "minimoe-16b", "--policies", "ema"]
    assert cli.main([*argv, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ndp_gym.evaluation.evaluate", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "file").write_text("")
    for argv in ("evaluate --out", "evaluate --json", "explain ema lru --json"):
        bad = tmp_path / "file" / "below"
        assert cli.main([*argv.split(), str(bad)]) == 2
        assert capsys.readouterr().err == f"ndp-gym: {tmp_path / 'file'}: Not a directory\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_batch_size_named_twice_runs_once_and_the_command_can_be_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    argv = ["evaluate", "--policies", "ema", "--batch-size", "2,2", "--max-windows", "1"]
    argv += ["--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["somewhere/ndp_gym/__main__.py", *argv])
    assert cli.main(argv) == 0
    document = json.loads(out.read_text())
    assert [row["policy"] for row in document["rows"]].count("ema") == 1
    assert document["provenance"]["command"] == " ".join(["python -m ndp_gym", *argv])


def test_the_environment_of_a_row_can_be_made_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    argv = ["evaluate", "--policies", "ema", "--json", str(out)]
    assert cli.main([*argv, "--batch-size", "32"]) == 0
    row = json.loads(out.read_text())["rows"][0]
    env = gymnasium.make(EnvSpec.from_json(row["env_spec"]))
    env.reset(seed=0)
    assert env.get_wrapper_attr("episodes").max_windows > row["n_windows"]
