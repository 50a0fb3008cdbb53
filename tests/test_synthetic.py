"""Synthetic recordings held against real ones: the halves, the control, and the page's numbers."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.inputs import bundled_trace_path
from ndp_gym.trace import RoutingTrace
from tests.conftest import make_trace
from train.findings.recordings import BUNDLED
from train.synthetic.compare import Comparison, Line, compare, floor, independent_like
from train.synthetic.halves import N_SPLITS, halves
from train.synthetic.measures import statistics
from train.synthetic.page import page, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "synthetic.md"
COLUMNS = ("fitted", "held_out", "synthetic", "control", "tolerance")


def line(**changes: object) -> Line:
    values = {"name": "reuse at lag 1", "first": 0.30, "real": 0.35, "synthetic": 0.42}
    return Line(**{**values, "control": 0.1, "tolerance": 0.08, **changes})


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, str]]:
    """The page's table of the bundled recording: cells by statistic and column."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {BUNDLED}\n")[2].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows[1:]}


@pytest.fixture(scope="module")
def bundled() -> tuple[RoutingTrace, RoutingTrace]:
    return next(halves(RoutingTrace.open(bundled_trace_path())))


def test_halves_by_conversation_share_none_and_leave_none_out() -> None:
    trace = make_trace(n_conversations=20)
    splits = list(halves(trace))
    assert len(splits) == N_SPLITS
    for first, second in splits:
        one, two = (set(half.requests.conversation.tolist()) for half in (first, second))
        assert not one & two
        assert one | two == set(range(20))
        assert first.n_rows + second.n_rows == trace.n_rows
        assert np.bincount([c % 2 for c in one]).tolist() == [5, 5]  # of either domain
    assert len({tuple(half.requests.conversation.tolist()) for half, _ in splits}) > 1


def test_halves_in_time_are_the_parts_of_every_request_in_turn() -> None:
    trace = make_trace(n_conversations=3)
    splits = list(halves(trace))
    first, second = splits[0]
    request = trace.requests
    half = int(request.length[0]) // 2
    np.testing.assert_array_equal(first.expert_ids[:half], trace.expert_ids[:half])
    n_late = int(second.requests.length[0])
    assert half + n_late == request.length[0]
    np.testing.assert_array_equal(
        second.expert_ids[:n_late], trace.expert_ids[half : half + n_late]
    )
    assert len(splits) == 2 ** (len(request) - 1)
    assert len({half.expert_ids.tobytes() for pair in splits for half in pair}) == 2 * len(splits)


def test_within_tolerance_by_hand() -> None:
    one = line()
    assert one.within(one.synthetic, one.tolerance)
    assert not one.within(one.synthetic, one.narrow)  # |.30 - .35| = .05 < .07
    assert not one.within(float("nan"), one.tolerance)
    assert line(first=0.35).narrow == 0.01
    assert floor("hottest expert / mean", 4.0) == pytest.approx(0.08)
    assert floor("tokens/s, lru", 0.1) == pytest.approx(0.002)


def test_the_page_counts_and_marks_what_is_not_within() -> None:
    comparison = Comparison(
        title="m", by_conversation=True, n_splits=8, n_rows=(5, 6), n_requests=(1, 2),
        lines=(line(), line(name="tokens/s, lru", control=0.36)),
    )  # fmt: skip
    assert comparison.passed("synthetic") == 2
    assert comparison.passed("control") == 1
    assert comparison.passed("synthetic", narrow=True) == 0
    text = page([comparison], ["Some model (needs x)"], 2.0)
    assert "| m | 2 | 2 (100 %) | 1 (50 %) | 0 (0 %) | 1 (50 %) |" in text
    assert "Not measured: Some model" in text
    assert list(table(comparison))[2] == (
        "| reuse at lag 1 | 0.300 | 0.350 | 0.420 | **0.100** | 0.080 |"
    )


def test_the_control_has_the_popularity_and_nothing_else(bundled) -> None:
    fitted, held_out = bundled
    control, real = (
        statistics(trace, loops=False) for trace in (independent_like(fitted, held_out), fitted)
    )
    assert control["entropy / ln E, pooled"] == pytest.approx(
        real["entropy / ln E, pooled"], abs=0.003
    )
    assert control["reuse at lag 1"] == pytest.approx(control["reuse by chance, pooled"], abs=0.005)
    assert real["reuse at lag 1"] > control["reuse at lag 1"] + 0.1


def cells_of(values: Mapping[str, float]) -> dict[str, str]:
    return {n: f"{v:.2f}" if "hottest expert" in n else f"{v:.3f}" for n, v in values.items()}


def test_the_page_says_what_the_bundled_recording_and_the_control_are(bundled, written) -> None:
    fitted, held_out = bundled
    for column, trace in (
        ("fitted", fitted),
        ("held_out", held_out),
        ("control", independent_like(fitted, held_out)),
    ):
        for name, cell in cells_of(statistics(trace, loops=False)).items():
            assert written[name][column].strip("*") == cell, (name, column)


def test_the_page_shows_the_control_fail_where_the_synthetic_one_passes(written) -> None:
    failed = {
        column: {name for name, cells in written.items() if cells[column].startswith("**")}
        for column in ("synthetic", "control")
    }
    assert len(failed["control"]) > 2 * len(failed["synthetic"])
    must = {"reuse at lag 1", "coverage of 16 tokens", "next layer, recall@k", "tokens/s, lru"}
    assert must <= failed["control"]
    summary = PAGE.read_text(encoding="utf-8").partition("## Summary")[2].split("\n## ")[0]
    row = re.search(rf"^\| {BUNDLED} \| (\d+) \| (\d+) \S+ %\) \| (\d+) ", summary, re.MULTILINE)
    assert row is not None
    n, synthetic, control = map(int, row.groups())
    assert n == len(written)
    assert n - synthetic == len(failed["synthetic"])
    assert n - control == len(failed["control"])


@pytest.mark.slow
def test_the_page_of_the_bundled_recording_is_what_the_script_writes() -> None:
    comparison = compare(BUNDLED, RoutingTrace.open(bundled_trace_path()))
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {BUNDLED}\n")[2].split("\n## ")[0]
    assert "\n".join(table(comparison)) in section
