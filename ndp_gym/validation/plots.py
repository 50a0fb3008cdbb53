"""One picture per group of rows, as SVG with text kept as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ndp_gym.charts import panels, svg
from ndp_gym.validation import sweep
from ndp_gym.validation.results import Row, by_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED, OURS, FAILED, BAND = "#9d9d9d", "#4c78a8", "#e45756", "#e8e8e8"


def draw_all(rows: Sequence[Row]) -> dict[str, bytes]:
    """SVG files by name: seed, sweep, latency, quality. All rows must have been computed."""
    groups = by_group(rows)
    draw: Mapping[str, tuple[tuple[float, float], int, Callable[[Sequence[Axes]], None]]] = {
        "seed": ((8.0, 6.0), 1, lambda axes: _bars(axes[0], groups["seed"])),
        "sweep": ((11.0, 2.8), 5, _curves),
        "latency": ((9.0, 4.2), 2, lambda axes: _latencies(axes, groups)),
        "quality": ((9.0, 4.2), 2, lambda axes: _losses(axes, groups["quality"])),
    }
    files = {}
    for name, (size, n_panels, fill) in draw.items():
        canvas, axes = panels(size, n_panels)
        fill(axes)
        files[f"validation-{name}.svg"] = svg(canvas)
    return files


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    places = np.arange(len(rows))
    published = [row.target.published for row in rows]
    axes.barh(places - 0.2, published, 0.4, color=MEASURED, label="published")
    for ok, colour, label in ((True, OURS, "ours"), (False, FAILED, "ours, outside tolerance")):
        chosen = [i for i, row in enumerate(rows) if row.ok is ok]
        values = [rows[i].ours or 0.0 for i in chosen]
        axes.barh(places[chosen] + 0.2, values, 0.4, color=colour, label=label)
    axes.set_yticks(places, [row.target.id.removeprefix("seed/") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio, or tokens per second where named so", fontsize=8)
    axes.legend(fontsize=7)


def _curves(axes: Sequence[Axes]) -> None:
    for panel, policy in zip(axes, sweep.POLICIES, strict=True):
        panel.plot(100 * sweep.SHARES, sweep.model_x(policy), color=OURS, label="model")
        panel.plot(
            100 * sweep.SHARES, sweep.measured_x(policy), "o", color=MEASURED, label="measured"
        )
        panel.set_title(f"{policy}, RMSE {sweep.rmse(policy):.3f}", fontsize=8)
        panel.set_xlabel("experts on GPU (%)", fontsize=8)
        panel.set_ylim(0, 1)
    axes[0].set_ylabel("time left, x", fontsize=8)
    axes[0].legend(fontsize=7)


def _latencies(axes: Sequence[Axes], groups: Mapping[str, Sequence[Row]]) -> None:
    in_hbm = [_point(row) for row in groups["inter-token latency"]]
    offload = [_point(r) for r in groups["cpu offload"] if r.target.kind != "bound"]
    _scatter(axes[0], in_hbm, "ms between tokens, all experts in HBM", 0.15)
    _scatter(axes[1], offload, "ms between tokens, experts on the CPU", 0.25)


def _losses(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    starts = ("quality/mixtral-ppl/", "quality/deepseek-moe")
    perplexities = [_point(row) for row in rows if row.target.id.startswith(starts)]
    losses = [_point(row) for row in rows if "-dnll/" in row.target.id]
    _scatter(axes[0], perplexities, "perplexity", 0.05)
    _scatter(axes[1], losses, "nats lost (ΔNLL)", None)


class _Point(NamedTuple):
    """Published and ours; ``ends`` are two predictions, or twice ours."""

    published: float
    ours: float
    ends: tuple[float, float]
    ok: bool
    calibrated: bool


def _point(row: Row) -> _Point:
    """The row as a point; speeds in tokens per second become ms between tokens."""
    t = row.target
    ours = row.ours or 0.0
    values = [t.published, ours, *(row.predictions or (ours, ours))]
    if t.quantity.startswith("tokens/s"):
        values = [1000 / value for value in values]
    published, ours, *ends = values
    return _Point(published, ours, (ends[0], ends[1]), bool(row.ok), t.kind == "calibrated")


def _scatter(axes: Axes, points: Sequence[_Point], what: str, band: float | None) -> None:
    """Ours over published on logarithmic axes; two predictions are joined by a line."""
    values = [value for p in points for value in (p.published, *p.ends)]
    limits = np.array([0.8 * min(values), 1.25 * max(values)])
    axes.plot(limits, limits, color="black", linewidth=0.8)
    if band is not None:
        axes.fill_between(limits, limits * (1 - band), limits * (1 + band), color=BAND)
    for point in points:
        colour = OURS if point.ok else FAILED
        axes.plot([point.published] * 2, point.ends, color=colour, linewidth=1)
        marker = "o" if point.calibrated else "D"
        axes.plot(point.published, point.ours, marker, color=colour, markersize=4)
    ticks = [d * 10.0**n for n in range(-5, 4) for d in (1, 2, 5)]
    ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axis.set_ticks([], minor=True)
    label = what if band is None else f"{what} (band ±{band:.0%})"
    axes.set_title(f"{label}\ncircles calibrated, diamonds predicted, red outside", fontsize=8)
    axes.set_xlabel("published", fontsize=8)
    axes.set_ylabel("ours", fontsize=8)
