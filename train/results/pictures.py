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
    """Reward on val over that of the planner alone: a line per seed, the best on val a large dot.

    Cards of agents from before whole curves were kept end at the best; then all lines do.
    """
    cards: list[tuple[str, dict[str, Any]]] = [
        (name, json.loads(path.read_text(encoding="utf-8")))
        for name in conditions
        for path in agent_files(name)
    ]
    are_whole = all(card["curve"][0][0] == 0 for _, card in cards)
    figure, (axes,) = panels((7.0, 3.4))
    labelled: set[str] = set()
    for name, card in cards:
        windows, _, reward = np.array(card["curve"]).T
        gain, best = reward - card["scores"]["reward_alone"], card["scores"]["n_windows_trained"]
        shown = (windows <= best) | are_whole
        axes.plot(
            windows[shown] / 1e3, gain[shown], "o-", color=COLOURS[name], linewidth=1,
            markersize=3, alpha=0.8, label=None if name in labelled else name,
        )  # fmt: skip
        if are_whole:
            axes.plot(windows[windows == best] / 1e3, gain[windows == best], "o", markersize=7,
                      color=COLOURS[name], alpha=0.8)  # fmt: skip
        labelled.add(name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.annotate("the tuned planner alone", (0.01, 0), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    best_on_val = "; large dot: the best on val" if are_whole else ", up to the best on val"
    axes.set_xlabel(f"thousand windows trained on{best_on_val}")
    axes.set_ylabel("reward gained on val")
    axes.legend(frameon=False, title="trained under", loc=(0.5, 0.12), ncols=3)
    return svg(figure)
