"""``ndp-gym trace stats --html``: one self-contained page about a recording, light and dark."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ndp_gym.report import write_whole
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_page_style import STYLE
from ndp_gym.trace_series import DRIFT_ROWS, Drift, Series, trace_series
from ndp_gym.trace_stats import TraceStatistics
from ndp_gym.trace_svg import (
    Axis,
    Curve,
    heat_map,
    level_legend,
    line_chart,
    unit_axis,
)

_POPULARITY_EDGES = (1e-9, 0.25, 0.5, 0.8, 1.25, 2, 4)  # times the mean expert
_POPULARITY_NAMES = ("never used", "below ¼", "¼ to ½", "½ to .8", ".8 to 1.25", "1.25 to 2",
                     "2 to 4", "4 and more times the mean")  # fmt: skip
_LIKENESS_EDGES = (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
_LIKENESS_NAMES = ("below 0", "0 to .1", ".1 to .2", ".2 to .3", ".3 to .4", ".4 to .6",
                   ".6 to .8", ".8 and more")  # fmt: skip
_MAX_PRINTED = 12  # conversations whose similarities are written into the map
_MAX_COLUMNS, _MAX_ROWS = 256, 128  # of the popularity map; neighbours are averaged beyond

Rows = Sequence[tuple[str, str, str]]
Floats = npt.NDArray[np.float64]


def write_page(
    path: Path,
    trace: RoutingTrace,
    statistics: TraceStatistics,
    table: Rows,
    *,
    phase: str = "all",
    seed: int = 0,
) -> None:
    """Write the page; it appears complete or not at all, and loads nothing from elsewhere.

    Args:
        path: File to write.
        trace: The recording.
        statistics: Of the rows of ``phase``.
        table: Rows of statistic, value and what stands beside it.
        phase: ``all``, ``prefill`` or ``decode``.
        seed: Of the shuffled controls.
    """
    series = trace_series(trace, phase, seed=seed)
    body = "\n".join(_body(trace, statistics, series, table, phase))
    title = f"Routing of {escape(trace.metadata.model)}"
    write_whole(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n",
    )


def _body(
    trace: RoutingTrace, statistics: TraceStatistics, series: Series, table: Rows, phase: str
) -> Iterator[str]:
    yield _facts(trace, statistics, series, phase)
    yield "<main>"
    yield _section("Popularity of experts", _popularity_note(statistics), _popularity(series))
    yield _section(
        "Popularity by rank",
        "Experts of every layer sorted from hottest to coldest, mean over layers. A single request "
        "is steeper than all together: what is hot changes from request to request.",
        _by_rank(series),
    )
    yield _section("Reuse by lag", _REUSE, _reuse(series, statistics, trace))
    yield _section("Coverage by window", _COVERAGE, _coverage(series))
    yield _section("Prefill against decode", _PREFILL, _prefill(series))
    yield _section("Drift", _drift_note(series.drift), _drift(series.drift))
    yield _section(
        "Similarity between conversations", _likeness_note(series), _likeness(series), wide=True
    )
    cells = "".join(
        f"<tr><th>{escape(a)}</th><td>{escape(b)}</td><td>{escape(c)}</td></tr>"
        for a, b, c in table
    )
    yield _section(
        "All statistics",
        "Means over layers; what <code>ndp-gym trace stats</code> prints.",
        "<table><thead><tr><th>statistic</th><th>value</th><th>beside it</th></tr></thead>"
        f"<tbody>{cells}</tbody></table>",
        wide=True,
    )
    yield "</main>"


_REUSE = (
    "Share of a token's experts that its request used <i>lag</i> tokens before. Above the shuffled "
    "line is what the order of tokens adds; a cache profits from it."
)
_COVERAGE = (
    "Share of a layer's experts that a window of consecutive tokens uses. Below the shuffled line "
    "the same experts come back."
)
_PREFILL = (
    "Rank correlation of the experts that a request's prompt and its answer use, by layer. The "
    "other line takes the prompt of another request: what remains there is common to all requests."
)


def _facts(trace: RoutingTrace, statistics: TraceStatistics, series: Series, phase: str) -> str:
    n_requests, n_conversations = statistics.n_requests, trace.requests.n_conversations
    facts = [
        f"{trace.n_layers} layers, {trace.n_experts} experts, top-{trace.top_k}",
        f"{statistics.n_rows:,} tokens ({phase} rows), {_several(n_requests, 'request')}, "
        f"{_several(n_conversations, 'conversation')}",
    ]
    if series.n_rows < statistics.n_rows:
        facts.append(f"charts of {series.n_requests:,} requests, {series.n_rows:,} tokens")
    facts.append(f"prefill: {trace.metadata.phases}")
    facts.append(f"source: {trace.metadata.source}")
    tiles = [
        ("Zipf exponent per request", statistics.zipf_request),
        ("share of the hottest 10 %", statistics.top10_share),
        ("reuse at lag 1", statistics.overlap[1]),
        ("coverage of 16 tokens", statistics.coverage[16]),
        ("next-layer recall", statistics.next_layer_recall),
    ]
    boxes = "".join(
        f"<div><b>{'n/a' if value is None else f'{value:.2f}'}</b><span>{name}</span></div>"
        for name, value in tiles
    )
    text = "".join(f"<li>{escape(fact)}</li>" for fact in facts if not fact.endswith(": "))
    return f'<ul class="facts">{text}</ul>\n<div class="tiles">{boxes}</div>'


def _section(title: str, note: str, content: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{title}</h2><p>{note}</p>{content}</section>"


def _popularity_note(statistics: TraceStatistics) -> str:
    return (
        "Use of every expert relative to the mean expert of its layer. Over all requests the "
        f"hottest 10 % of the experts take {100 * statistics.top10_share:.0f} % of the work."
    )


def _popularity(series: Series) -> str:
    values = _averaged(series.popularity, _MAX_ROWS, _MAX_COLUMNS)
    n_layers, n_experts = series.popularity.shape
    x = [(n / n_experts * values.shape[1], f"{n}") for n in _round_ticks(n_experts, 8)]
    y = [((n + 0.5) / n_layers * values.shape[0], f"{n}") for n in _round_ticks(n_layers, 8)]
    levels = np.searchsorted(_POPULARITY_EDGES, values, side="right")
    chart = heat_map(
        "Popularity by layer and expert",
        levels,
        ("expert", "routed layer"),
        ticks=([(p + values.shape[1] / n_experts / 2, t) for p, t in x], y),
    )
    return level_legend(_POPULARITY_NAMES) + chart


def _averaged(values: Floats, n_rows: int, n_columns: int) -> Floats:
    """Blocks of neighbours averaged so that at most so many rows and columns are left."""
    for axis, most in ((0, n_rows), (1, n_columns)):
        edges = np.linspace(0, values.shape[axis], min(most, values.shape[axis]) + 1).astype(int)
        sums = np.add.reduceat(values, edges[:-1], axis=axis)
        shape = (-1, 1) if axis == 0 else (1, -1)
        values = sums / np.diff(edges).reshape(shape)
    return values


def _by_rank(series: Series) -> str:
    n_experts = len(series.by_rank)
    ranks = np.unique(np.rint(np.geomspace(1, n_experts, 60)).astype(int))
    curves = [
        Curve(name=name, colour=colour, dots=False,
              points=[(int(r), float(values[r - 1])) for r in ranks])
        for name, colour, values in (
            ("all requests together", 0, series.by_rank),
            ("one request (mean)", 1, series.by_rank_request),
        )
    ]  # fmt: skip
    y = unit_axis("use / mean expert's use", [p for c in curves for _, p in c.points])
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= n_experts]
    x = Axis(label="rank of the expert (log scale)", low=1, high=n_experts,
             ticks=[(n, f"{n}") for n in ticks], log=True)  # fmt: skip
    even = Curve(name="even use", points=[(1, 1.0), (n_experts, 1.0)], colour=2, dashed=True,
                 dots=False)  # fmt: skip
    return line_chart("Popularity by rank", x, y, [*curves, even])


def _reuse(series: Series, statistics: TraceStatistics, trace: RoutingTrace) -> str:
    lags = list(series.overlap)
    uniform = trace.top_k / trace.n_experts
    curves = [
        Curve(name="recorded", points=list(series.overlap.items()), colour=0),
        Curve(name="shuffled within the request", points=list(series.overlap_shuffled.items()),
              colour=1),
        Curve(name=f"chance if all experts were alike, {uniform:.3f}",
              points=[(lags[0], uniform), (lags[-1], uniform)], colour=2, dashed=True, dots=False),
    ]  # fmt: skip
    return _by_number("Reuse by lag", "lag, tokens (log scale)", "share of experts reused", curves)


def _coverage(series: Series) -> str:
    curves = [
        Curve(name="recorded", points=list(series.coverage.items()), colour=0),
        Curve(name="shuffled within the request", points=list(series.coverage_shuffled.items()),
              colour=1),
    ]  # fmt: skip
    return _by_number(
        "Coverage by window", "window, tokens (log scale)", "share of experts used", curves
    )


def _by_number(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    high = max(x for curve in curves for x, _ in curve.points)
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= high]
    x = Axis(label=x_label, low=1, high=max(high, 2), ticks=[(n, f"{n}") for n in ticks], log=True)
    return line_chart(
        title, x, unit_axis(y_label, [y for c in curves for _, y in c.points]), curves
    )


def _prefill(series: Series) -> str:
    if series.prefill is None:
        return '<p class="none">No request has both prefill and decode rows.</p>'
    lines = [("its own prompt", 0, series.prefill)]
    if series.prefill_other is not None:
        lines.append(("the prompt of another request", 1, series.prefill_other))
    curves = [
        Curve(name=f"{name}, mean {values.mean():.2f}", colour=colour,
              points=list(enumerate(values.tolist())))
        for name, colour, values in lines
    ]  # fmt: skip
    y = unit_axis("rank correlation (Spearman)", [v for c in curves for _, v in c.points])
    return line_chart("Prefill against decode", _layer_axis(len(series.prefill)), y, curves)


def _layer_axis(n_layers: int) -> Axis:
    ticks = [(n, f"{n}") for n in _round_ticks(n_layers, 10)]
    return Axis(label="routed layer", low=0, high=max(1, n_layers - 1), ticks=ticks)


def _drift_note(drift: Drift | None) -> str:
    note = (
        f"Cosine of the experts used in the {DRIFT_ROWS} tokens before and the {DRIFT_ROWS} after "
        "a place, mean over layers. "
    )
    if drift is None:
        return note
    found = len(drift.changes) or "none"
    return note + (
        f"Thin lines: a request begins. Strong lines: change points ({found}), where the curve is "
        f"lowest and more than three interquartile ranges below its median (dashed, "
        f"{drift.level:.2f})."
    )


def _drift(drift: Drift | None) -> str:
    if drift is None:
        return f'<p class="none">Fewer than {3 * DRIFT_ROWS} tokens.</p>'
    points = list(zip(drift.rows.tolist(), drift.likeness.tolist(), strict=True))
    level = [(0.0, drift.level), (float(drift.n_rows), drift.level)]
    curves = [Curve(name="likeness of neighbouring windows", points=points, colour=0, dots=False)]
    low = min(float(drift.likeness.min()), drift.level)
    if drift.level > 0:
        curves.append(
            Curve(name="level of a change", points=level, colour=2, dashed=True, dots=False)
        )
    bottom = max(0.0, float(np.floor(low * 10) / 10))
    ticks = np.arange(round(bottom * 10), 11) / 10
    y = Axis(label="cosine", low=bottom, high=1.0, ticks=[(t, f"{t:.1f}") for t in ticks])
    shown = "all" if drift.is_all else "the first"
    x = Axis(label=f"token, in file order ({shown} {drift.n_rows:,})", low=0, high=drift.n_rows,
             ticks=[(n, f"{n:,}") for n in _round_ticks(drift.n_rows + 1, 6)])  # fmt: skip
    return line_chart(
        "Drift along the recording", x, y, curves, marks=drift.changes, faint=drift.boundaries[1:]
    )


def _likeness_note(series: Series) -> str:
    domains = np.array(series.domains)
    note = "Rank correlation of the experts that two conversations use, mean over layers, by domain"
    apart = ~np.eye(len(domains), dtype=bool)
    same = apart & (domains[:, None] == domains[None])
    other = apart & ~same
    means = [
        f"{series.likeness[mask].mean():.2f} {name}"
        for name, mask in (("within a domain", same), ("between domains", other))
        if mask.any()
    ]
    return f"{note}: {', '.join(means)} on average." if means else f"{note}."


def _likeness(series: Series) -> str:
    n = len(series.domains)
    if n < 2:
        return '<p class="none">There is one conversation.</p>'
    levels = np.searchsorted(_LIKENESS_EDGES, series.likeness, side="right")
    levels[np.eye(n, dtype=bool)] = -1
    firsts = [i for i in range(n) if i == 0 or series.domains[i] != series.domains[i - 1]]
    spans = list(zip(firsts, [*firsts[1:], n], strict=True))
    names = [((a + b) / 2, _short(series.domains[a])) for a, b in spans]
    across = [(place, text if len(spans) <= 5 else "") for place, text in names]
    chart = heat_map(
        "Similarity between conversations",
        levels,
        ("conversation, by domain", "conversation, by domain"),
        ticks=(across, names),
        lines=firsts[1:],
        square=True,
        values=series.likeness if n <= _MAX_PRINTED else None,
    )
    return level_legend(_LIKENESS_NAMES) + chart


def _several(n: int, what: str) -> str:
    return f"{n:,} {what}s" if n > 1 else f"{n or 'no'} {what}"


def _short(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


def _round_ticks(n: int, most: int) -> list[int]:
    """Round numbers from 0 to below ``n``, at most ``most`` + 1."""
    step = next(s for e in range(9) for s in (10**e, 2 * 10**e, 5 * 10**e) if (n - 1) / s <= most)
    return list(range(0, n, step))
