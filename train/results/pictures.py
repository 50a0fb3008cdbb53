"""The picture of the page: what agents reach on val while they train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ndp_gym.charts import panels, svg
from train.curves import draw_curve, name_axes
from train.results.contenders import Folders

COLOURS = {"fix": "#9d6bb0", "rand": "#4c78a8", "hidden": "#e45756", "drift": "#54a24b"}


def learning_curves(conditions: Sequence[str], folders: Folders) -> bytes:
    """Reward on val over the planner alone's: a line per seed, the best on val a large dot."""
    figure, (axes,) = panels((7.0, 3.4))
    for name in conditions:
        for n, path in enumerate(folders.agent_files(name)):
            card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            draw_curve(axes, card, COLOURS[name], None if n else name)
    name_axes(axes, "the tuned planner")
    axes.legend(frameon=False, title="trained under", loc=(0.35, 0.12), ncols=len(COLOURS))
    return svg(figure)
