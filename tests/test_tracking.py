"""Offline runs hold what an evaluation found, write nowhere else, and need nobody's account."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ndp_gym.report import write_png
from ndp_gym.trace import RoutingTrace
from ndp_gym.tracking import log_agent, log_trace, track_evaluation, tracked_run
from tests.conftest import make_trace
from tests.sample_results import sample_result
from tests.wandb_reader import payloads, read_run

KEYS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No inherited settings, no account, and a home folder that shows stray writes."""
    for key in [k for k in os.environ if k.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True
    )


def test_offline_run_reads_back_config_rows_summary_and_exit(tmp_path: Path) -> None:
    result = sample_result(trace_sha256="f" * 64)
    write_png(result, tmp_path / "figure.png")
    folder = track_evaluation(
        result, output_dir=tmp_path / "out", image=tmp_path / "figure.png", settings=settings()
    )
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "out")
    logged = read_run(folder)
    assert logged.config["trace_sha256"] == "f" * 64
    rows = [line for line in logged.history if "policy" in line]
    assert [line["policy"] for line in rows] == ["all_far4", "all_far2", "cost_aware", "all_hbm"]
    assert [line["global_step"] for line in rows] == [0, 1, 2, 3]
    assert rows[2]["perf/tokens_per_s"] == 150.0
    assert rows[2]["quality/delta_nll_nats"] == 0.02
    assert "perf/tokens_per_s" not in rows[3]  # infeasible
    assert logged.summary["cost_aware/reward"] == 0.43
    assert logged.summary["n_rows"] == 4
    assert logged.exit_code == 0
    media = [p.suffixes for p in (folder / "files" / "media").rglob("*") if p.is_file()]
    assert sorted(media) == [[".png"], [".table", ".json"], [".table", ".json"]]


def test_nothing_is_written_outside_the_output_folder(tmp_path: Path) -> None:
    track_evaluation(sample_result(), output_dir=tmp_path / "out", settings=settings())
    assert not list((tmp_path / "home").rglob("*"))
    assert not any(key in os.environ for key in KEYS)


def test_folders_the_user_has_set_are_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(mine))
    folder = track_evaluation(sample_result(), output_dir=tmp_path / "out", settings=settings())
    assert folder is not None
    assert folder.is_relative_to(mine)
    assert os.environ["WANDB_DIR"] == str(mine)


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    assert track_evaluation(sample_result(), output_dir=tmp_path / "out", mode="disabled") is None
    assert not (tmp_path / "out").exists()


def test_a_run_whose_block_raises_is_marked_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        tracked_run({"seed": 3}, output_dir=tmp_path, settings=settings()),
    ):
        raise RuntimeError("boom")
    logged = read_run(tmp_path)
    assert logged.config["seed"] == 3
    assert logged.exit_code == 1


def test_an_agent_is_logged_with_its_files_and_scores(tmp_path: Path) -> None:
    for name in ("best.safetensors", "best.json"):
        (tmp_path / name).write_text(name)
    with tracked_run({}, output_dir=tmp_path / "out", settings=settings()) as run:
        log_agent(run, tmp_path / "best.safetensors", {"split": "val", "reward": 0.5})
        for name in ("best.safetensors", "best.json"):
            (tmp_path / name).write_text("written over since")
    (logged,) = read_run(tmp_path / "out").artifacts
    assert (logged.type, logged.metadata) == ("model", {"split": "val", "reward": 0.5})
    copies = {name: copy.read_text() for name, copy in logged.files.items()}
    assert copies == {"best.safetensors": "best.safetensors", "best.json": "best.json"}
    assert all(copy.is_relative_to(tmp_path / "out") for copy in logged.files.values())


def test_recordings_are_named_and_never_uploaded(tmp_path: Path) -> None:
    in_memory = make_trace(n_layers=2, n_experts=4)
    path = tmp_path / "long: name.safetensors"
    in_memory.save(path)
    with tracked_run({}, output_dir=tmp_path / "out", settings=settings()) as run:
        log_trace(run, RoutingTrace.open(path))
        log_trace(run, in_memory)
    logged, other = read_run(tmp_path / "out").artifacts
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (logged.type, logged.name) == ("trace", f"trace-long--name-{digest[:12]}")
    assert logged.metadata["sha256"] == digest
    assert logged.metadata["name"] == path.name
    assert logged.metadata["size_bytes"] == path.stat().st_size
    assert logged.files == other.files == {}
    assert other.metadata["size_bytes"] is None
    assert other.name.startswith("trace-memory-")


def test_unknown_mode_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"offline, online, disabled, got 'dryrun'"),
        tracked_run({}, output_dir=tmp_path, mode="dryrun"),  # type: ignore[arg-type]
    ):
        pass


def test_importing_the_module_imports_no_wandb() -> None:
    code = "import sys, ndp_gym.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reader_rejects_a_flipped_bit(tmp_path: Path) -> None:
    with tracked_run({"seed": 3}, output_dir=tmp_path, settings=settings()) as run:
        for step in range(300):  # more than one block of 32,768 bytes
            run.log({"global_step": step, "train/loss": 1.0, "note": "x" * 200})
    assert len(read_run(tmp_path).history) == 300
    path = next(p for p in tmp_path.rglob("run-*.wandb") if "latest-run" not in p.parts)
    data = bytearray(path.read_bytes())
    assert len(data) > 2 * 32768
    data[40000] ^= 1
    with pytest.raises(ValueError, match="damaged record"):
        list(payloads(bytes(data)))
