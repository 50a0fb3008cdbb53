"""Published values to recompute: data in two CSV files, and when a value of ours agrees.

``targets.csv`` is fixed: ids, values, kinds and tolerances never change. ``more_targets.csv`` holds
further rows in the same columns.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, TypeAlias, get_args

Kind = Literal["calibrated", "predicted", "bound"]
Mode = Literal["rel", "abs", "min", "bracket", "factor-1"]

Ours: TypeAlias = "float | tuple[float, float]"
"""A value of ours; for mode ``bracket`` two predictions that should enclose the published one."""

FILES = ("targets.csv", "more_targets.csv")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One published value.

    Attributes:
        id: Name of the row, ``group/what/…``.
        group: Rows that are shown together.
        source: Where the value was published.
        quantity: What was measured, with its unit.
        published: The value.
        kind: ``calibrated`` rows chose a constant of the model, ``predicted`` rows did not,
            ``bound`` rows are one-sided.
        tolerance: Allowed deviation; its meaning depends on ``mode``.
        mode: ``rel`` and ``factor-1``: of ``ours / published`` from 1; ``abs``: of the difference;
            ``min``: ours at least the published value; ``bracket``: the published value between
            two predictions, each widened by the tolerance.
        note: What to know about the row.
    """

    id: str
    group: str
    source: str
    quantity: str
    published: float
    kind: Kind
    tolerance: float
    mode: Mode
    note: str = ""

    def __post_init__(self) -> None:
        """Check the two names and that the tolerance is not negative."""
        for name, allowed in (("kind", get_args(Kind)), ("mode", get_args(Mode))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"target {self.id!r}: {name} must be one of {allowed}, "
                    f"got {getattr(self, name)!r}"
                )
        if not self.tolerance >= 0:
            raise ValueError(f"target {self.id!r}: tolerance must be >= 0, got {self.tolerance}")

    @property
    def is_measured_ratio(self) -> bool:
        """Whether ``ours / published`` says how close: not for residuals of 0 and yes/no rows."""
        return self.published > 0 and not (self.mode == "abs" and self.tolerance == 0)

    def value(self, ours: Ours) -> float:
        """The one number to show: of two predictions the nearer one."""
        if not isinstance(ours, tuple):
            return ours
        return min(ours, key=lambda x: abs(math.log(x / self.published)))

    def accepts(self, ours: Ours) -> bool:
        """Whether ours agrees with the published value within the tolerance."""
        if isinstance(ours, tuple):
            low, high = min(ours) * (1 - self.tolerance), max(ours) * (1 + self.tolerance)
            return low <= self.published <= high
        if self.mode == "min":
            return ours >= self.published
        if self.mode == "abs":
            return abs(ours - self.published) <= self.tolerance
        return abs(ours / self.published - 1) <= self.tolerance


@cache
def load_targets() -> tuple[Target, ...]:
    """All rows of both files, in file order.

    Raises:
        ValueError: A row is malformed or an id stands twice.
    """
    found: dict[str, Target] = {}
    for name in FILES:
        text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for fields in csv.DictReader(io.StringIO(text)):
            target = _target(fields)
            if target.id in found:
                raise ValueError(f"{name}: id must be unique, got {target.id!r} twice")
            found[target.id] = target
    return tuple(found.values())


def _target(fields: dict[str, str]) -> Target:
    kind, mode = fields["kind"], fields["mode"]
    return Target(
        id=fields["target"],
        group=fields["group"],
        source=fields["source"],
        quantity=fields["quantity"],
        published=float(fields["published"]),
        kind=kind,  # type: ignore[arg-type]  # checked by Target
        tolerance=float(fields["tolerance"]),
        mode=mode,  # type: ignore[arg-type]
        note=fields["note"] or "",
    )


def target(target_id: str) -> Target:
    """The row of that id.

    Raises:
        ValueError: There is none.
    """
    for row in load_targets():
        if row.id == target_id:
            return row
    raise ValueError(f"target must be an id of {FILES}, got {target_id!r}")
