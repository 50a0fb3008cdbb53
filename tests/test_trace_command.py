"""``ndp-gym trace``: what is written and printed, and one sentence for bad input."""

import re
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.cli import main
from ndp_gym.commands.trace import FORMATS
from ndp_gym.importers import FORMATS as IMPORTERS
from ndp_gym.trace import RoutingTrace

GEMMA = "Helldez__BigMoeOnEdge/docs/bench-data/2026-07-15-route-trace/gemma.route.csv.gz"


@pytest.fixture
def array(tmp_path: Path) -> Path:
    ids = np.argsort(np.random.default_rng(0).random((40, 2, 8)), axis=2)[:, :, :2]
    path = tmp_path / "a.npy"
    np.save(path, ids.astype(np.uint8))
    return path


def test_the_formats_offered_are_those_that_exist():
    assert tuple(IMPORTERS) == FORMATS


def test_import_writes_a_trace_and_says_what_it_is(array, tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    code = main(["trace", "import", str(array), "--out", str(out), "--prompt-tokens", "10"])
    printed = capsys.readouterr()
    assert code == 0
    assert RoutingTrace.open(out).requests.n_prompt.tolist() == [10]
    assert "1 in 1 conversations" in printed.out
    assert "warning: fewer than 16 conversations (1)" in printed.err
    for command in ("info", "verify", "stats"):
        assert main(["trace", command, str(out)]) == 0
    assert "overlap at lag 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--format", "hdmoe"], "a.npy: "),
        (["--model", "mixtral-8x7b"], "mixtral-8x7b has 32 routed layers"),
        (["--spans", "3"], "--spans is not accepted"),
        (["--spans", "x"], "must be whole numbers"),
        (["--experts", "0"], "must be a whole number in 1..65536"),
        (["--experts", "3"], "expert_ids must be in 0..n_experts-1=2"),
        (["--prompt-tokens", "41"], "n_prompt must be in 0..40, got 41"),
        (["--drop-prefix", "40"], "drop_prefix must be in 0..39"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(array, tmp_path, capsys, extra, message):
    out = tmp_path / "t.safetensors"
    try:
        code = main(["trace", "import", str(array), "--out", str(out), *extra])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_out_file_in_no_folder_or_over_the_input_is_refused(array, tmp_path, capsys):
    for out in (tmp_path / "no" / "t", tmp_path, array):
        assert main(["trace", "import", str(array), "--out", str(out)]) == 2
        assert "--out must" in capsys.readouterr().err


def test_a_missing_or_foreign_file_is_one_sentence(array, tmp_path, capsys):
    for command in ("info", "verify", "stats"):
        for path in (tmp_path / "missing", array, tmp_path):
            assert main(["trace", command, str(path)]) == 2
            assert re.fullmatch(r"ndp-gym: .+\n", capsys.readouterr().err)


def test_stats_of_a_recording_with_gates(shared_traces, tmp_path, capsys):
    out = tmp_path / "gemma"
    arguments = [str(shared_traces / GEMMA), "--out", str(out), "--model", "gemma-4-26b-a4b"]
    assert main(["trace", "import", *arguments]) == 0
    assert RoutingTrace.open(out).metadata.preset == "gemma-4-26b-a4b"
    assert main(["trace", "stats", str(out), "--phase", "decode"]) == 0
    assert "0.311 0.200 0.153 0.127" in capsys.readouterr().out
