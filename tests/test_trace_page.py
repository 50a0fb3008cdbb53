"""The page about a recording: complete, self-contained, and its series by hand."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.cli import main
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import Requests
from ndp_gym.trace_series import DRIFT_ROWS, trace_series
from ndp_gym.trace_stats import trace_statistics
from ndp_gym.trace_svg import Axis, heat_map, unit_axis
from tests.conftest import make_trace

SECTIONS = (
    "Popularity of experts",
    "Popularity by rank",
    "Reuse by lag",
    "Coverage by window",
    "Prefill against decode",
    "Drift",
    "Similarity between conversations",
    "All statistics",
)
VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed without having been opened; keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_startendtag(self, tag, attrs) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(trace: RoutingTrace, folder: Path, *options: str) -> tuple[str, Balanced]:
    path, out = folder / "t.safetensors", folder / "page.html"
    trace.save(path)
    assert main(["trace", "stats", str(path), "--html", str(out), *options]) == 0
    text = out.read_text(encoding="utf-8")
    parsed = Balanced()
    parsed.feed(text)
    assert parsed.open == []
    return text, parsed


@pytest.mark.parametrize("options", [(), ("--phase", "decode"), ("--phase", "prefill")])
def test_the_page_has_every_section_and_loads_nothing(tmp_path, capsys, options) -> None:
    text, parsed = page_of(make_trace(n_layers=3, n_experts=8), tmp_path, *options)
    assert tuple(parsed.headings) == SECTIONS
    assert "Wrote " in capsys.readouterr().out
    for tag, name, value in parsed.attributes:
        assert name not in {"src", "href", "xlink:href", "srcset"}, (tag, name, value)
    assert not re.search(r"<(script|link|img|iframe|object)|url\(|@import|https?://", text)
    assert "prefers-color-scheme:dark" in text
    charts = sum(tag == "svg" and name == "aria-label" for tag, name, _ in parsed.attributes)
    assert charts == 7 - ("Fewer than 120 tokens" in text)


def test_text_from_the_file_is_escaped(tmp_path) -> None:
    trace = make_trace()
    facts = TraceMetadata(model="<script>x</script> & co", n_experts=4, top_k=2, source="<b>")
    trace = RoutingTrace.from_arrays(trace.expert_ids, trace.requests, facts)
    text, _ = page_of(trace, tmp_path)
    assert "<script" not in text
    assert "<b>" not in re.sub(r"<div><b>", "", text)
    assert "&lt;script&gt;x&lt;/script&gt; &amp; co" in text


def test_one_short_request_of_one_layer_makes_a_page(tmp_path) -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[0, 2]]])
    requests = Requests.from_table(np.array([[0, 0, 3, 0, 0, 0, 2]]), ("only",))
    facts = TraceMetadata(model="m", n_experts=4, top_k=2)
    text, _ = page_of(RoutingTrace.from_arrays(ids, requests, facts), tmp_path)
    for reason in ("There is one conversation", "Fewer than 120 tokens", "No request has both"):
        assert reason in text


@pytest.mark.parametrize("name", ["no/such/folder.html", "t.safetensors", "."])
def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys, name) -> None:
    path = tmp_path / "t.safetensors"
    make_trace().save(path)
    assert main(["trace", "stats", str(path), "--html", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ndp-gym: --html must")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def shifting(at: int, n_rows: int) -> RoutingTrace:
    """One request whose experts are drawn from 0..7 before row ``at`` and from 8..15 after it."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((n_rows, 2, 8)), axis=2)[:, :, :2]
    ids[at:] += 8
    requests = Requests.from_table(np.array([[0, 8, n_rows, 0, 0, 0, 2]]), ("only",))
    return RoutingTrace.from_arrays(ids, requests, TraceMetadata(model="m", n_experts=16, top_k=2))


def test_an_abrupt_shift_is_the_one_change_point() -> None:
    drift = trace_series(shifting(304, 800)).drift
    assert drift is not None
    assert drift.changes == (304,)
    assert drift.likeness[drift.rows == 304] == 0
    assert drift.rows[0] == DRIFT_ROWS
    assert drift.rows[-1] == 800 - DRIFT_ROWS
    unchanged = trace_series(shifting(0, 800)).drift
    assert unchanged is not None
    assert unchanged.changes == ()


def test_series_agree_with_the_statistics(tiny_trace) -> None:
    series, statistics = trace_series(tiny_trace, seed=1), trace_statistics(tiny_trace, seed=1)
    for lag in (1, 2, 4, 8, 16):
        assert series.overlap[lag] == pytest.approx(statistics.overlap[lag])
    assert series.coverage[16] == pytest.approx(statistics.coverage[16])
    assert 64 not in series.coverage  # no request has 64 rows
    assert series.coverage[1] == pytest.approx(tiny_trace.top_k / tiny_trace.n_experts)
    assert series.popularity.mean(axis=1) == pytest.approx(1)
    assert series.by_rank[0] == pytest.approx(statistics.max_over_mean)
    assert series.prefill.mean() == pytest.approx(statistics.prefill_spearman)
    assert np.diag(series.likeness) == pytest.approx(1)
    assert series.domains == tuple(sorted(series.domains))


def test_every_cell_of_a_heat_map_is_drawn_once() -> None:
    levels = np.array([[0, 1, -1], [2, 2, 7]])
    text = heat_map("m", levels, ("x", "y"), ticks=((), ()))
    cells = {k: d.count("z") for k, d in re.findall(r'class="h(\d)" d="([^"]+)"', text)}
    assert cells == {"0": 1, "1": 1, "2": 2, "7": 1}


def test_axes_place_values_where_they_belong() -> None:
    x = Axis(label="lag", low=1, high=64, ticks=(), log=True)
    assert x.place(8, 0, 100) == pytest.approx(50)
    y = unit_axis("share", [0.12, 0.43])
    assert (y.low, y.high) == pytest.approx((0, 0.5))
    assert unit_axis("correlation", [-0.13, 0.6]).low == pytest.approx(-0.2)
