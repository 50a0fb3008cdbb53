"""The whole validation: all rows, what a left-out source shows, and how well rankings agree."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ndp_gym.validation.holdout import Fold, folds
from ndp_gym.validation.orderings import THRESHOLD, Ordering, orderings
from ndp_gym.validation.recordings import PublicFile, Recordings
from ndp_gym.validation.results import Errors, Row, by_group, compute_rows, errors


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Everything ``ndp-gym validate`` shows.

    Attributes:
        rows: All targets in file order.
        folds: Constants fitted without one source.
        orderings: Agreement of rankings with the measurements.
        missing: Public files that some rows need and that were not there.
    """

    rows: list[Row]
    folds: list[Fold]
    orderings: list[Ordering]
    missing: list[PublicFile]

    @property
    def unexpected(self) -> list[Row]:
        """Rows that fail though nobody said that they would."""
        return [row for row in self.rows if row.is_unexpected_failure]

    @property
    def expected_failures(self) -> list[Row]:
        """Rows that fail as expected."""
        return [row for row in self.rows if row.ok is False and row.reason]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document but for its provenance."""
        found = {kind: errors(self.rows, kind) for kind in ("predicted", "calibrated")}
        return {
            "rows": [row.to_dict() for row in self.rows],
            "summary": {
                "log_error": {k: e and e._asdict() for k, e in found.items()},
                "leave_one_source_out": [fold.to_dict() for fold in self.folds],
                "orderings": [{**o._asdict(), "kendall_tau": o.tau} for o in self.orderings],
            },
        }


def validate(recordings: Recordings | None = None) -> Validation:
    """Compute and judge everything; rows whose recording is missing are skipped.

    Raises:
        ValueError: A recording is damaged, or a target has no computation.
    """
    recordings = recordings or Recordings()
    return Validation(
        rows=compute_rows(recordings),
        folds=folds(recordings),
        orderings=orderings(),
        missing=recordings.missing(),
    )


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent; a dash for nothing."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def count_line(validation: Validation) -> str:
    """How many rows agree, fail and were skipped."""
    counts = Counter(row.ok for row in validation.rows)
    return (
        f"{len(validation.rows)} rows: {counts[True]} agree within their tolerance, "
        f"{len(validation.expected_failures)} fail as expected, "
        f"{len(validation.unexpected)} fail unexpectedly, {counts[None]} skipped"
    )


def error_lines(validation: Validation) -> list[str]:
    """Median and 90th percentile of ``|log(ours / published)|`` over predicted rows."""
    lines = []
    overall = errors(validation.rows)
    if overall is not None:
        lines.append(f"predicted rows, |log(ours/published)|: {_text(overall)}")
    for group, rows in by_group(validation.rows).items():
        found = errors(rows)
        if found is not None:
            lines.append(f"- {group}: {_text(found)}")
    calibrated = errors(validation.rows, "calibrated")
    if calibrated is not None:
        lines.append(f"calibrated rows, for comparison: {_text(calibrated)}")
    return lines


def _text(found: Errors) -> str:
    return (
        f"median {found.median:.3f} (factor {math.exp(found.median):.2f}), "
        f"90th percentile {found.p90:.3f} (factor {math.exp(found.p90):.2f}), {found.n} rows"
    )


def fold_cells(fold: Fold) -> tuple[str, str, str, str, str]:
    """Constants, left-out source, values without it, values in use, and how it is predicted."""
    if fold.rmse is not None:
        outcome = f"RMSE of x {fold.rmse:.3f}"
    else:
        outcome = f"{min(fold.ratios):.2f}..{max(fold.ratios):.2f} of published"
    values = [", ".join(number(v) for v in part) for part in (fold.fitted, fold.default)]
    return fold.constants, fold.left_out, values[0], values[1], outcome


def ordering_cells(ordering: Ordering) -> tuple[str, str, str]:
    """Comparison, Kendall's tau, and the pairs behind it."""
    tau = "-" if ordering.tau is None else f"{ordering.tau:+.2f}"
    pairs = f"{ordering.n_agree} of {ordering.n_pairs} pairs that differ by more than"
    return ordering.name, tau, f"{pairs} {THRESHOLD:.0%}"


def status(row: Row) -> str:
    """``yes``, ``NO``, ``NO, expected`` or ``skipped``."""
    if row.ok is None:
        return "skipped"
    if row.ok:
        return "yes"
    return "NO, expected" if row.reason else "NO"


def tolerance(row: Row) -> str:
    """The tolerance with its mode, as the tables show it."""
    amount = row.target.tolerance
    return {
        "rel": f"±{amount:.0%}",
        "factor-1": f"±{amount:.0%}",
        "abs": f"±{amount:g}",
        "min": "at least",
        "bracket": f"between two, ±{amount:.0%}",
    }[row.target.mode]


def ours(row: Row) -> str:
    """Our value; both predictions of a bracket row."""
    if row.predictions is None:
        return number(row.ours)
    return "..".join(number(value) for value in sorted(row.predictions))
