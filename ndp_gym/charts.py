"""Charts of the generated pages: panels in a row, and SVG that depends on the numbers alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["panels", "svg"]


def panels(
    size: tuple[float, float], n_panels: int = 1, n_rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` inches with panels, so many per row, row by row; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(n_rows, n_panels, squeeze=False).flat)


def svg(figure: Figure) -> bytes:
    """The figure as SVG with text as text."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ndp-gym"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    # matplotlib leaves blanks at line ends
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"
