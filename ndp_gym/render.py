"""A placement as text: one line per layer, one character per expert. Pure; knows no environment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_HBM_BITS = {16: "F", 8: "E", 4: "D", 3: "C", 2: "B", 1: "A"}
_FAR_BITS = {16: "f", 8: "e", 4: "d", 3: "c", 2: "b", 1: "a"}
_NONE, _OTHER = ".", "?"
MAX_COLUMNS = 128


def placement_text(
    hbm_bits: ArrayLike, far_bits: ArrayLike, target_bits: ArrayLike, title: str = ""
) -> str:
    """Where every expert's weights are now, [L, E] bits each (0 = no copy).

    Capitals stand in HBM, small letters on the far device: F/f 16, E/e 8, D/d 4, C/c 3, B/b 2,
    A/a 1 bit, ``.`` nothing yet. ``*`` marks layers with copies on their way. More than 128
    experts per layer are cut off.
    """
    hbm, far, target = (np.asarray(bits) for bits in (hbm_bits, far_bits, target_bits))
    lines = [title] if title else []
    lines.append(_legend(hbm, far))
    moving = (target != 0) & (target != hbm)
    width = len(str(len(hbm) - 1))
    for layer in range(len(hbm)):
        cells = "".join(_cells(hbm[layer], far[layer]))
        cut = cells[:MAX_COLUMNS] + ("..." if len(cells) > MAX_COLUMNS else "")
        mark = f" *{int(moving[layer].sum())}" if moving[layer].any() else ""
        lines.append(f"{layer:>{width}} {cut}{mark}")
    return "\n".join(lines)


def _cells(hbm: NDArray[np.uint8], far: NDArray[np.uint8]) -> Sequence[str]:
    return [
        _HBM_BITS.get(int(h), _OTHER) if h else _FAR_BITS.get(int(f), _OTHER if f else _NONE)
        for h, f in zip(hbm, far, strict=True)
    ]


def _legend(hbm: NDArray[np.uint8], far: NDArray[np.uint8]) -> str:
    """The letters in use and how many experts each stands for."""
    counts = [
        f"{letters.get(int(bits), _OTHER)}={where} {int(bits)} bit x{int((shown == bits).sum())}"
        for where, letters, shown in (
            ("HBM", _HBM_BITS, hbm),
            ("far", _FAR_BITS, np.where(hbm == 0, far, 0)),
        )
        for bits in np.unique(shown)[::-1]
        if bits
    ]
    return "  ".join(counts) or "nothing placed yet"
