"""Line charts and heat maps as inline SVG, coloured by the classes of `trace_page`'s style."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 12, 48
N_LEVELS = 8  # colours of a heat map


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its name, points by x, and the number of its colour (0..2)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False
    dots: bool = True


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: label with unit, range, ticks with their text, logarithmic or not."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float, start: float, length: float) -> float:
        """Where ``value`` lies on ``length`` pixels from ``start``."""
        low, high, at = (
            (np.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return float(start + length * (at - low) / ((high - low) or 1.0))


def unit_axis(label: str, values: Sequence[float]) -> Axis:
    """A linear axis from 0 (or below, where values are) in steps of .05, .1, .2 or .25."""
    top, bottom = max([*values, 0.05]), min([*values, 0.0])
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9)
                if (top - bottom) / s <= 6)  # fmt: skip
    low, high = np.floor(bottom / step - 1e-9), np.ceil(top / step - 1e-9)
    low = 0.0 if bottom >= 0 else low
    ticks = [(n * step, f"{n * step:.2g}") for n in np.arange(low, high + 1)]
    return Axis(label=label, low=low * step, high=high * step, ticks=ticks)


def line_chart(
    title: str,
    x: Axis,
    y: Axis,
    curves: Sequence[Curve],
    *,
    marks: Sequence[float] = (),
    faint: Sequence[float] = (),
) -> str:
    """A chart with its legend; ``marks`` are strong and ``faint`` are weak vertical lines."""
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        return x.place(px, _LEFT, across), y.place(py, _TOP + down, -down)

    parts = [_axes(x, y, at)]
    for name, places in (("faint", faint), ("mark", marks)):
        d = "".join(f"M{at(p, y.low)[0]:.1f} {_TOP}v{down}" for p in places)
        parts += [f'<path class="{name}" d="{d}"/>'] if d else []
    for curve in curves:
        spots = [at(*point) for point in curve.points]
        dash = " dashed" if curve.dashed else ""
        d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
        parts.append(f'<path class="line c{curve.colour}{dash}" d="{d}"/>')
        if curve.dots:
            parts += [
                f'<circle class="dot c{curve.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>{escape(curve.name)}: {px:g}, {py:.3g}</title></circle>"
                for (a, b), (px, py) in zip(spots, curve.points, strict=True)
            ]
    keys = "".join(
        f'<span class="key"><i class="swatch c{c.colour}{" dashed" if c.dashed else ""}"></i>'
        f"{escape(c.name)}</span>"
        for c in curves
    )
    return f'<p class="legend">{keys}</p>' + _svg(title, _WIDTH, _HEIGHT, parts)


def heat_map(
    title: str,
    levels: npt.NDArray[np.int64],
    labels: tuple[str, str],
    *,
    ticks: tuple[Sequence[tuple[float, str]], Sequence[tuple[float, str]]],
    lines: Sequence[float] = (),
    square: bool = False,
    values: npt.NDArray[np.float64] | None = None,
) -> str:
    """Cells ``[rows, columns]`` of levels 0..7, -1 for none; one path per level.

    Args:
        title: For readers who do not see it.
        levels: Of every cell.
        labels: Of the horizontal and the vertical axis.
        ticks: Of both axes, in columns and rows.
        lines: Places of lines across, in rows and columns (``square`` only).
        square: Whether cells are square.
        values: Written into the cells that have a level.
    """
    n_rows, n_columns = levels.shape
    left = 100 if square else _LEFT
    width = min(_WIDTH - left - _RIGHT, 460) if square else _WIDTH - left - _RIGHT
    height = width if square else int(np.clip(14 * n_rows, 110, 420))
    dx, dy = width / n_columns, height / n_rows
    x = [f"{left + i * dx:.1f}" for i in range(n_columns + 1)]
    y = [f"{_TOP + i * dy:.1f}" for i in range(n_rows + 1)]
    parts = []
    for level in np.unique(levels[levels >= 0]):
        d = "".join(
            f"M{x[c]} {y[r]}H{x[c + 1]}V{y[r + 1]}H{x[c]}z" for r, c in np.argwhere(levels == level)
        )
        parts.append(f'<path class="h{level}" d="{d}"/>')
    if values is not None:
        for r, c in np.argwhere(levels >= 0):
            kind = "value dark" if levels[r, c] > N_LEVELS // 2 else "value"
            place = left + (c + 0.5) * dx, _TOP + (r + 0.5) * dy + 4
            parts.append(_text(*place, f"{values[r, c]:.2f}", "middle", kind))
    for line in lines:
        a, b = left + line * dx, _TOP + line * dy
        parts.append(f'<path class="cut" d="M{a:.1f} {_TOP}v{height}M{left} {b:.1f}h{width}"/>')
    for value, text in ticks[0]:
        parts.append(_text(left + value * dx, _TOP + height + 16, text))
    for value, text in ticks[1]:
        parts.append(_text(left - 6, _TOP + value * dy + 4, text, "end"))
    parts.append(_text(left + width / 2, _TOP + height + 38, labels[0], "middle", "label"))
    middle = _TOP + height / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle:.0f}) '
        f'rotate(-90)">{escape(labels[1])}</text>'
    )
    return _svg(title, _WIDTH, _TOP + height + _BOTTOM, parts)


def level_legend(names: Sequence[str]) -> str:
    """The colours of a heat map with what they mean."""
    keys = "".join(
        f'<span class="key"><i class="cell h{level}"></i>{escape(name)}</span>'
        for level, name in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'


def _axes(x: Axis, y: Axis, at: Callable[[float, float], tuple[float, float]]) -> str:
    (left, bottom), (right, top) = at(x.low, y.low), at(x.high, y.high)
    parts = []
    for value, text in y.ticks:
        _, height = at(x.low, value)
        parts.append(f'<path class="grid" d="M{left:.1f} {height:.1f}H{right:.1f}"/>')
        parts.append(_text(left - 8, height + 4, text, "end"))
    for value, text in x.ticks:
        place, _ = at(value, y.low)
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom:.1f}v4"/>')
        parts.append(_text(place, bottom + 18, text))
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
    parts.append(_text((left + right) / 2, bottom + 40, x.label, "middle", "label"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle:.0f}) '
        f'rotate(-90)">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{name}">'
        + "".join(parts)
        + "</svg>"
    )
