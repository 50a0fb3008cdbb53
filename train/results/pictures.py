"""The picture of the page: what agents reach on val while they train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ndp_gym.charts import panels, svg
from train.results.contenders import Folders

COLOURS = {"fix": "#9d6bb0", "rand": "#4c78a8", "hidden": "#e45756", "drift": "#54a24b"}


def learning_curves(conditions: Sequence[str], folders: Folders) -> bytes:
    """Reward on val over the planner alone's: a line per seed, the best on val a large dot."""
    figure, (axes,) = panels((7.0, 3.4))
    for name in conditions:
        for n, path in enumerate(folders.agent_files(name)):
            card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            windows, _, reward = np.array(card["curve"]).T
            gain = reward - card["scores"]["reward_alone"]
            is_best = windows == card["scores"]["n_windows_trained"]
            axes.plot(
                windows / 1e3, gain, "o-", color=COLOURS[name], linewidth=1, markersize=3,
                alpha=0.8, label=None if n else name,
            )  # fmt: skip
            axes.plot(windows[is_best] / 1e3, gain[is_best], "o", markersize=7,
                      color=COLOURS[name], alpha=0.8)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.annotate("the tuned planner alone", (0.01, 0), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("thousand windows trained on; large dot: the best on val")
    axes.set_ylabel("reward gained on val")
    axes.legend(frameon=False, title="trained under", loc=(0.5, 0.12), ncols=3)
    return svg(figure)
