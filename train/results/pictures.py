"""The picture of the page: what agents reach on val while they train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ndp_gym.charts import panels, svg
from train.results.conditions import agent_files

COLOURS = {"rand": "#4c78a8", "hidden": "#e45756", "drift": "#54a24b"}


def learning_curves(conditions: Sequence[str]) -> bytes:
    """Reward on val over that of the planner alone: a line per seed, up to the agent that ships."""
    figure, (axes,) = panels((7.0, 3.4))
    for name in conditions:
        for place, path in enumerate(agent_files(name)):
            card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            windows, _, reward = np.array(card["curve"]).T
            axes.plot(
                windows / 1e3, reward - card["scores"]["reward_alone"], "o-", color=COLOURS[name],
                linewidth=1, markersize=3, alpha=0.8, label=name if place == 0 else None,
            )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.annotate("the tuned planner alone", (0.01, 0), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("thousand windows trained on, up to the best on val")
    axes.set_ylabel("reward gained on val")
    axes.legend(frameon=False, title="trained under", loc=(0.5, 0.12), ncols=3)
    return svg(figure)
