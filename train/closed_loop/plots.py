"""The pictures of ``docs/quality.md``, as SVG with text kept as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ndp_gym.charts import panels, svg
from train.closed_loop.bitmaps import BEST, DEFAULT, Measured
from train.closed_loop.closed import Loop
from train.closed_loop.summary import TOLERANCE, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "mean 2": "#e45756", "mean 2.5": "#f58518", "mean 3": "#54a24b", "mean 3.5": "#4c78a8",
    "policies": "#9d9d9d", "uniform": "#000000",
}  # fmt: skip
MARKS = {"uniform": "D", "policies": "^"}
FLOOR = 5e-3  # nats; what is measured or predicted below is left out


def draw(
    measured: Measured, verdicts: Sequence[Verdict], loops: Sequence[Loop]
) -> dict[str, bytes]:
    """SVG files by name."""
    shown = [v for v in verdicts if v.way in (DEFAULT, BEST)]
    scatter, axes = panels((10.0, 4.9), len(shown))
    for panel, verdict in zip(axes, shown, strict=True):
        _maps(panel, measured, verdict)
    axes[0].legend(fontsize=7, loc="upper left", framealpha=0.9)
    loop, axes = panels((10.0, 4.0), 3)
    _loops(axes, loops)
    return {"quality_maps.svg": svg(scatter), "quality_loop.svg": svg(loop)}


def _maps(axes: Axes, measured: Measured, verdict: Verdict) -> None:
    predicted, nats = measured.predicted[verdict.way] * verdict.scale, measured.nats
    shown = (predicted > FLOOR) & (nats > FLOOR)
    strata = np.array([m.stratum for m in measured.maps])
    span = [FLOOR, 2 * max(nats.max(), predicted.max())]
    axes.plot(span, span, color="#cccccc", linewidth=1, zorder=0)
    for name in COLOURS:
        here = shown & (strata == name)
        axes.errorbar(
            predicted[here], nats[here], yerr=measured.errors[here], linestyle="none",
            marker=MARKS.get(name, "o"), markersize=4.5, elinewidth=0.7, alpha=0.8,
            color=COLOURS[name], label=f"{name} bits" if name.startswith("mean") else name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span)
    axes.set_aspect("equal")
    axes.set_xlabel(f"predicted ΔNLL x {verdict.scale:.2f} (nats)", fontsize=8)
    axes.set_ylabel("measured ΔNLL (nats)", fontsize=8)
    axes.set_title(verdict.way, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)


def _loops(axes: Sequence[Axes], loops: Sequence[Loop]) -> None:
    bits = np.array([row.mean_bits for row in loops])
    speed = np.array([[row.speed_error, row.free_speed_error] for row in loops]) * 100
    hits = np.array([[row.hit_error, row.free_hit_error] for row in loops]) * 100
    sets = np.array([[row.forced_changed[0], row.free_changed[0]] for row in loops]) * 100
    uses_hbm = np.array([row.open.hit_rate > 0 for row in loops])
    titles = ("tokens/s, %", "hit rate, points", "sets of experts that change, %")
    for panel, title, values, kept in zip(
        axes, titles, (speed, hits, sets), (bits > 0, uses_hbm, bits > 0), strict=True
    ):
        for column, (colour, mark, label) in enumerate(
            (("#4c78a8", "o", "recorded answers"), ("#f58518", "x", "own answers"))
        ):
            panel.plot(
                bits[kept], values[kept, column], mark, color=colour, label=label, markersize=5
            )
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("mean bits served", fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_xticks((1, 2, 3, 4, 8, 16), ("1", "2", "3", "4", "8", "16"))
        panel.tick_params(labelsize=7)
    for panel in axes[:2]:
        panel.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color="#e8e8e8", zorder=0)
        panel.axhline(0, color="#9d9d9d", linewidth=0.8)
    axes[0].legend(fontsize=7)
