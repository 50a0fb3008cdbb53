"""Learning curves: what agents gain on val over the planner that they bend, while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ndp_gym.charts import panels, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curve(
    axes: Axes, card: Mapping[str, Any], colour: str | None = None, label: str | None = None
) -> None:
    """The curve in the card of a run's best agent; that agent is a large dot."""
    windows, _, reward = np.array(card["curve"]).T
    gain = reward - card["scores"]["reward_alone"]
    is_best = windows == card["scores"]["n_windows_trained"]
    (line,) = axes.plot(
        windows / 1e3, gain, "o-", color=colour, linewidth=1, markersize=3, alpha=0.8, label=label
    )
    axes.plot(windows[is_best] / 1e3, gain[is_best], "o", markersize=7,
              color=line.get_color(), alpha=0.8)  # fmt: skip


def name_axes(axes: Axes, planner: str) -> None:
    """Zero is ``planner`` alone."""
    axes.axhline(0, color="black", linewidth=0.8)
    axes.annotate(f"{planner} alone", (0.01, 0), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("thousand windows trained on; large dot: the best on val")
    axes.set_ylabel("reward gained on val")


def curve_of_run(card: Mapping[str, Any]) -> bytes:
    """SVG of the run whose best agent has this card."""
    figure, (axes,) = panels((7.0, 3.4))
    draw_curve(axes, card)
    name_axes(axes, "the planner")
    return svg(figure)
