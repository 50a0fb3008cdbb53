"""The picture of an evaluation: throughput with intervals, and throughput against quality.

Drawn with matplotlib's Agg canvas and no pyplot, so it needs no display and keeps no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ndp_gym.results import MODELED, EvaluationResult, Row, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]


def figure(result: EvaluationResult) -> Figure:
    """Per condition: throughput bars with intervals, and throughput over ΔNLL with its front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = result.by_condition()
    n_policies = max((len(rows) for rows in groups.values()), default=1)
    size = (11.0, max(3.0, 1.6 + 0.28 * n_policies) * max(1, len(groups)) + 0.4)
    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(max(1, len(groups)), 2, squeeze=False)
    for (bars, front), (condition, rows) in zip(axes, groups.items(), strict=bool(groups)):
        _draw_bars(bars, rows)
        _draw_front(front, rows)
        bars.set_title(str(condition), fontsize=8, loc="left")
    canvas.supxlabel(MODELED, fontsize=8)
    return canvas


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    values = [row["tokens_per_s"] or 0.0 for row in rows]
    colours = ["#4c78a8" if r["validity"] == "in_range" else "#b3c6dc" for r in rows]
    axes.barh(range(len(rows)), values, color=colours)
    axes.margins(y=0.01)
    for place, row in enumerate(rows):
        value, interval = row["tokens_per_s"], row["tokens_per_s_ci95"]
        if value is None:
            axes.annotate(f" {row['validity']}", (0, place), va="center", fontsize=7)
        elif interval is not None:
            errors = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
            axes.errorbar(value, place, xerr=errors, color="black", capsize=2, linewidth=1)
    axes.set_yticks(range(len(rows)), _labels(rows), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second (light: extrapolated); sorted by reward", fontsize=8)


def _labels(rows: Sequence[Row]) -> list[str]:
    """Policies with the numbers that mark their points in the right-hand panel."""
    return [f"{row['policy']}  {place}" for place, row in enumerate(rows, start=1)]


def _draw_front(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    front = pareto_front(rows)
    for row in rows:
        loss, speed = row["delta_nll_nats"], row["tokens_per_s"]
        if loss is None or speed is None:
            continue
        colour = "#e45756" if any(row is other for other in front) else "#9d9d9d"
        marker = "x" if row["sees_future"] else "o"
        fill = colour if row["validity"] == "in_range" else "white"
        axes.plot([loss], [speed], marker=marker, color=fill, markeredgecolor=colour, markersize=4,
                  linestyle="none", zorder=3)  # fmt: skip
    for label, loss, speed in _clusters(rows):
        axes.annotate(label, (loss, speed), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.step(
        [r["delta_nll_nats"] or 0.0 for r in front],
        [r["tokens_per_s"] or 0.0 for r in front],
        where="post",
        color="#e45756",
        linewidth=1,
    )
    axes.set_xlabel("ΔNLL (nats); red: Pareto front; x: sees the future; hollow: extrapolated",
                    fontsize=8)  # fmt: skip
    axes.set_ylabel("tokens per second", fontsize=8)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(left=-0.0005)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")
    axes.margins(x=0.08)


def _clusters(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(numbers, ΔNLL, tokens per second) of labels; points that would overprint share one."""
    points = [
        (place, row["delta_nll_nats"], row["tokens_per_s"])
        for place, row in enumerate(rows, start=1)
        if row["delta_nll_nats"] is not None and row["tokens_per_s"] is not None
    ]
    points.sort(key=lambda point: (-(point[2] or 0.0), point[0]))
    labels: list[tuple[list[int], float, float]] = []
    for place, loss, speed in points:
        assert loss is not None
        assert speed is not None
        for numbers, x, y in labels:
            if abs(loss - x) < 0.08 * max(loss, x, 0.01) and abs(speed - y) < 0.06 * y:
                numbers.append(place)
                break
        else:
            labels.append(([place], loss, speed))
    return [(_ranges(sorted(numbers)), x, y) for numbers, x, y in labels]


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 3-5`` for 1, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
