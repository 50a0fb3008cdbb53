"""Synthetic recordings: held-out statistics, determinism, bounded memory, loops, gates."""

import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import synthesize, trace_file
from ndp_gym.cli import main
from ndp_gym.importers import import_trace
from ndp_gym.synthesize import (
    Generator,
    Shape,
    fit_profile,
    pattern,
    request_table,
    write_trace,
)
from ndp_gym.synthesize.profile import RoutingProfile, calibrated
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_loops import looped_rows
from ndp_gym.trace_requests import Requests
from ndp_gym.trace_stats import TraceStatistics, trace_statistics

DEEPSEEK = "BrianBoitano__nvmoe/traces/dsv2lite-all.tokens.jsonl.gz"
FLAT = RoutingProfile(
    popularity=(1.0,), model_share=0.2, domain_share=0.4, fast=(0.4,), slow=0.1, coupling=0.5
)

# How far a held-out half may be from what was drawn like the other half: about the distance of the
# two real halves (docs/synthetic.md).
TOLERANCES = {
    "zipf": 0.08,
    "zipf_request": 0.12,
    "top10_share": 0.04,
    "chance_request": 0.03,
    "lag1": 0.035,
    "lag1 excess": 0.035,
    "lag16": 0.035,
    "coverage16": 0.05,
    "coverage64": 0.05,
    "domain_spearman": 0.15,
    "next_layer_recall": 0.08,
    "prefill_spearman": 0.2,
}


def statistics(trace: RoutingTrace) -> dict[str, float]:
    s: TraceStatistics = trace_statistics(trace, loops=False)
    values = {
        "lag1": s.overlap[1],
        "lag1 excess": s.overlap[1] - s.chance_request,
        "lag16": s.overlap[16],
        "coverage16": s.coverage[16],
        "coverage64": s.coverage[64],
    }
    return {name: values.get(name, getattr(s, name, None)) for name in TOLERANCES}


def part(trace: RoutingTrace, table: np.ndarray) -> RoutingTrace:
    """The rows of the spans of a request table as a trace of their own."""
    rows = np.concatenate([np.arange(r[0], r[0] + r[2]) for r in table])
    table = table.copy()
    table[:, 0] = np.cumsum(table[:, 2]) - table[:, 2]
    table[:, 6] = 2
    requests = Requests.from_table(table, trace.requests.domains)
    return RoutingTrace.from_arrays(trace.expert_ids[rows], requests, trace.metadata)


def halves_in_time(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """First and second half of every request, the first quarter of each taken as its prompt."""
    first, second = trace.requests.table().copy(), trace.requests.table().copy()
    first[:, 2] //= 2
    second[:, 0] += first[:, 2]
    second[:, 2] -= first[:, 2]
    for table in (first, second):
        table[:, 1] = table[:, 2] // 4
    return part(trace, first), part(trace, second)


def halves_by_conversation(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    odd = trace.requests.conversation % 2 == 1
    table = trace.requests.table()
    return part(trace, table[~odd]), part(trace, table[odd])


def drawn_like(trace: RoutingTrace, profile: RoutingProfile, seed: int = 7) -> RoutingTrace:
    shape = Shape(n_layers=trace.n_layers, n_experts=trace.n_experts, top_k=trace.top_k)
    pieces = Generator(profile, shape, seed=seed).pieces(trace.requests)
    ids = np.concatenate([piece.expert_ids for piece in pieces])
    return RoutingTrace.from_arrays(ids, trace.requests, trace.metadata)


def misses(real: RoutingTrace, synthetic: RoutingTrace) -> dict[str, tuple[float, float]]:
    wanted, got = statistics(real), statistics(synthetic)
    return {
        name: (round(wanted[name], 3), round(got[name], 3))
        for name, tolerance in TOLERANCES.items()
        if wanted[name] is not None and abs(wanted[name] - got[name]) > tolerance
    }


@pytest.fixture(scope="module")
def deepseek(shared_traces: Path) -> RoutingTrace:
    return import_trace([shared_traces / DEEPSEEK]).trace


@pytest.fixture(scope="module", params=["deepseek", "mixtral"])
def halves(request: pytest.FixtureRequest) -> tuple[RoutingTrace, RoutingTrace]:
    if request.param == "deepseek":
        return halves_in_time(request.getfixturevalue("deepseek"))
    return halves_by_conversation(request.getfixturevalue("mixtral_trace"))


@pytest.mark.shared
def test_a_fit_to_one_half_has_the_statistics_of_the_other(halves) -> None:
    fitted, held_out = halves
    profile = fit_profile(fitted)
    assert misses(held_out, drawn_like(held_out, profile)) == {}
    control = replace(profile, fast=(0.0,), slow=0.0, coupling=0.0)
    failed = misses(held_out, drawn_like(held_out, control))
    assert {"lag1 excess", "next_layer_recall"} <= failed.keys(), failed


@pytest.mark.shared
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "mixtral-8x7b"])
def test_the_calibration_of_a_preset_has_the_statistics_of_its_recording(name, request) -> None:
    source = {"deepseek-v2-lite": "deepseek", "mixtral-8x7b": "mixtral_trace"}[name]
    trace = request.getfixturevalue(source)
    assert misses(trace, drawn_like(trace, pattern(name).profile)) == {}


def test_the_bundled_recording_can_be_imitated(tmp_path, monkeypatch) -> None:
    bundled = Path(__file__).parents[1] / "traces" / "minimoe.safetensors"
    monkeypatch.setattr(synthesize, "fit_profile", partial(fit_profile, rounds=8))
    like = pattern(str(bundled))
    trace = write_trace(tmp_path / "t", like, request_table(64, 200, like.domains))
    real = trace_statistics(RoutingTrace.open(bundled), loops=False)
    ours = trace_statistics(trace, loops=False)
    assert ours.overlap[1] == pytest.approx(real.overlap[1], abs=0.04)
    assert ours.next_layer_recall == pytest.approx(real.next_layer_recall, abs=0.09)
    assert ours.gate_profile == pytest.approx(real.gate_profile, abs=0.01)
    assert trace.metadata.extra["synthetic"] is True
    assert trace.metadata.model.endswith("(synthetic)")
    trace.verify()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path) -> None:
    like = pattern("deepseek-v2-lite", n_layers=3)
    table = request_table(20, 30, like.domains)
    one, two, other = (
        write_trace(tmp_path / name, like, table, seed=seed)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one.sha256 == two.sha256 != other.sha256
    assert one.save(tmp_path / "again").sha256 == one.sha256


def test_a_request_does_not_depend_on_the_others() -> None:
    shape = Shape(n_layers=2, n_experts=300, top_k=3)
    long, short = request_table(8, 600, ("a", "b")), request_table(4, 600, ("a", "b"))
    table = long.table()[:4]
    assert len(short) == 4
    alone = Requests.from_table(table, ("a", "b"))
    rows = [
        np.concatenate([p.expert_ids for p in Generator(FLAT, shape).pieces(requests)])
        for requests in (long, alone)
    ]
    np.testing.assert_array_equal(rows[0][: len(rows[1])], rows[1])
    assert rows[0].dtype == np.uint16


def test_memory_does_not_grow_with_the_recording(tmp_path) -> None:
    like = pattern("deepseek-v2-lite")
    peaks = []
    for n_requests in (4, 16):
        table = request_table(n_requests, 500, like.domains)
        tracemalloc.start()
        trace = write_trace(tmp_path / str(n_requests), like, table)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert trace.n_rows == n_requests * 500
    assert peaks[1] < 1.1 * peaks[0] < 40e6


def test_lengths_add_up_and_domains_shift_in_runs() -> None:
    table = request_table(40, 97, ("a", "b"), run=5)
    assert table.length.sum() == 40 * 97
    assert table.length.min() >= 4
    assert table.domain[:15].tolist() == [0] * 5 + [1] * 5 + [0] * 5
    assert np.bincount(table.split).tolist() == [20, 10, 10]


def test_asked_for_loops_are_found_by_the_detector() -> None:
    shape = Shape(n_layers=8, n_experts=32, top_k=4)
    table = request_table(6, 700, ("a",))
    for share, low, high in ((0.0, 0.0, 0.0), (1.0, 0.1, 1.0)):
        pieces = Generator(FLAT, shape, loops=share).pieces(table)
        ids = np.concatenate([piece.expert_ids for piece in pieces])
        spans = zip(table.start, table.end, strict=True)
        looped = np.mean([looped_rows(ids[a:b]).mean() for a, b in spans])
        assert low <= looped <= high


def test_gates_descend_and_have_the_mean_of_the_profile() -> None:
    gates = (0.4, 0.3, 0.2, 0.1)
    shape = Shape(n_layers=3, n_experts=8, top_k=4)
    profile = replace(FLAT, gates=gates)
    pieces = list(Generator(profile, shape).pieces(request_table(5, 800, ("a",))))
    weights = np.concatenate([p.gate_weights for p in pieces]).astype(np.float64)
    assert (np.diff(weights, axis=2) <= 0).all()
    np.testing.assert_allclose(weights.mean(axis=(0, 1)), gates, atol=0.004)


def test_an_unrecorded_shape_takes_the_nearest_calibration(tmp_path) -> None:
    like = pattern(None, n_layers=5, n_experts=1000, top_k=16)
    trace = write_trace(tmp_path / "t", like, request_table(2, 40, like.domains))
    trace.verify()
    assert (trace.n_layers, trace.n_experts, trace.top_k) == (5, 1000, 16)
    assert trace.metadata.preset is None
    assert calibrated(None, 8, 2)[0] == "mixtral-8x7b"
    assert calibrated(None, 60, 4)[0] == "qwen1.5-moe-a2.7b"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--like", "mixtrl"], "did you mean"),
        (["--like", "no/such.safetensors"], "no such file"),
        ([], "n_layers must be in 1..1000, got 0"),
        (["--like", "mixtral-8x7b", "--top-k", "9"], "top_k must be in 1..8, got 9"),
        (["--like", "mixtral-8x7b", "--experts", "1001"], "n_experts must be in 1..1000"),
        (["--like", "mixtral-8x7b", "--loops", "2"], "loops must be in 0..1"),
        (["--like", "mixtral-8x7b", "--seed", "-1"], "--seed must be 0 or more"),
    ],
)
def test_bad_wishes_are_one_sentence_and_write_nothing(tmp_path, capsys, extra, message) -> None:
    out = tmp_path / "t"
    arguments = ["--requests", "2", "--tokens", "8", "--out", str(out), *extra]
    assert main(["trace", "synthesize", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_trace_and_says_that_it_is_synthetic(tmp_path, capsys) -> None:
    out = tmp_path / "t"
    arguments = ["--like", "mixtral-8x7b", "--requests", "17", "--tokens", "8", "--out", str(out)]
    assert main(["trace", "synthesize", *arguments]) == 0
    assert "synthetic, not a recording" in capsys.readouterr().out
    trace = RoutingTrace.open(out)
    assert trace.metadata.preset == "mixtral-8x7b"
    assert trace.n_rows == 17 * 8


def test_a_writer_leaves_nothing_behind_unless_every_row_was_written(tmp_path) -> None:
    layout = {"a": (np.dtype(np.uint8), (4, 2)), "b": (np.dtype(np.int64), (2,))}
    rows = np.zeros((2, 2), dtype=np.uint8)
    with (
        pytest.raises(ValueError, match="not all rows of a, b written"),
        trace_file.Writer(tmp_path / "t", layout, "{}") as writer,
    ):
        writer.append("a", rows)
    for bad, message in ((rows[:, :1], "rows of uint8"), (np.zeros((5, 2), np.uint8), "got more")):
        with (
            pytest.raises(ValueError, match=message),
            trace_file.Writer(tmp_path / "t", layout, "{}") as writer,
        ):
            writer.append("a", bad)
    assert list(tmp_path.iterdir()) == []
