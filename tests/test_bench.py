import json
from pathlib import Path

import pytest

from ndp_gym import bench, cli
from ndp_gym.bench import BenchRow
from ndp_gym.bench_large import write_large
from ndp_gym.trace import RoutingTrace


def test_command_prints_each_row_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [
        BenchRow(name="steps", value=12_345.6, unit="1/s", baseline=6_172.8, baseline_name="slow"),
        BenchRow(name="open", value=2.5, unit="ms"),
    ]
    monkeypatch.setattr(bench, "rows", lambda: iter(measured))
    assert cli.main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    assert "steps: 12,346 1/s (slow: 6,173 1/s, ratio 2)" in printed
    assert "open: 2.5 ms" in printed
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["ratio"] for row in rows] == [2.0, None]


def test_cache_replay_is_measured_on_equal_hits_or_alone() -> None:
    (row,) = bench.cache_replay()
    assert row.value > 0
    assert (row.baseline is None) == (row.baseline_name == "libCacheSim is not installed")


@pytest.mark.slow
def test_the_large_recording_opens_and_its_content_is_valid(tmp_path: Path) -> None:
    size = write_large(tmp_path / "large.safetensors")
    trace = RoutingTrace.open(tmp_path / "large.safetensors")
    assert size > 9.9e9
    first = trace.split_requests("test")[-1]
    trace.window(int(trace.requests.start[first]), 100)
