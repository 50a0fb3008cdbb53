"""Published against ours: every row computed and judged, and the numbers that sum them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ndp_gym.validation import cpu_offload, in_hbm, quality, seed, sweep
from ndp_gym.validation.expected import EXPECTED_FAILURES
from ndp_gym.validation.recordings import MissingRecordingError, Recordings
from ndp_gym.validation.targets import Ours, Target, load_targets


class Provider(NamedTuple):
    """A function that computes the rows whose id starts with ``prefix``."""

    prefix: str
    rows: Callable[[Recordings], Mapping[str, Ours]]


def _in_hbm_brackets(recordings: Recordings) -> dict[str, Ours]:
    return {
        served.target(batch): in_hbm.bracket_ms(recordings, served, batch)
        for served in in_hbm.TRACED
        for batch in served.batches
    }


def _seed_latency(_: Recordings) -> dict[str, Ours]:
    return {f"seed/ndp-latency/{bits}bit": seed.far_latency_ratio(bits) for bits in (3, 2)}


# The longest prefix that fits decides.
PROVIDERS: Sequence[Provider] = (
    Provider("seed/", seed.rows),
    Provider("seed/ndp-latency/", _seed_latency),
    Provider("seed/accuracy-drop/", quality.accuracy_rows),
    Provider("ktransformers/", lambda _: sweep.rows()),
    Provider("itl/", lambda _: {**in_hbm.milliseconds(), **in_hbm.batch_1_tokens_per_s()}),
    Provider("itl/gpt-oss-120b-mxfp4/", _in_hbm_brackets),
    Provider(
        "kernel/",
        lambda _: {in_hbm.kernel_target(n): in_hbm.kernel_us(n) for n in in_hbm.KERNEL_EXPERTS},
    ),
    Provider("cpu-offload/", lambda _: cpu_offload.rows()),
    Provider("quality/", lambda _: quality.rows()),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One target beside what the project computes.

    Attributes:
        target: What was published.
        ours: The computed value, of two predictions the nearer; ``None`` where skipped.
        predictions: Both predictions of a ``bracket`` row.
        ok: Whether they agree within the tolerance; ``None`` where skipped.
        skipped: Why nothing was computed.
        reason: Why a failure of this row is expected.
    """

    target: Target
    ours: float | None
    predictions: tuple[float, float] | None = None
    ok: bool | None
    skipped: str = ""
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over published; ``None`` where that says nothing."""
        if self.ours is None or self.target.published == 0:
            return None
        return self.ours / self.target.published

    @property
    def log_error(self) -> float | None:
        """``|log(ours / published)|`` of rows that measure something."""
        if self.ratio is None or not self.target.is_measured_ratio:
            return None
        return abs(math.log(self.ratio))

    @property
    def is_unexpected_failure(self) -> bool:
        """Whether the row fails though nobody said that it would."""
        return self.ok is False and not self.reason

    def to_dict(self) -> dict[str, Any]:
        """The row of the JSON document."""
        t = self.target
        return {
            "target": t.id,
            "group": t.group,
            "source": t.source,
            "quantity": t.quantity,
            "published": t.published,
            "ours": self.ours,
            "predictions": None if self.predictions is None else list(self.predictions),
            "ratio": self.ratio,
            "kind": t.kind,
            "tolerance": t.tolerance,
            "mode": t.mode,
            "ok": self.ok,
            "expected_failure": self.reason or None,
            "skipped": self.skipped or None,
        }


class Errors(NamedTuple):
    """Distribution of ``|log(ours / published)|`` over ``n`` rows."""

    n: int
    median: float
    p90: float


def compute_rows(recordings: Recordings) -> list[Row]:
    """All targets in file order, computed or skipped with the reason.

    Raises:
        ValueError: A target has no computation.
    """
    computed: dict[str, Mapping[str, Ours] | MissingRecordingError] = {}
    rows = []
    for target in load_targets():
        provider = _provider(target)
        if provider.prefix not in computed:
            try:
                computed[provider.prefix] = provider.rows(recordings)
            except MissingRecordingError as missing:
                computed[provider.prefix] = missing
        rows.append(_row(target, computed[provider.prefix]))
    return rows


def _provider(target: Target) -> Provider:
    fitting = [p for p in PROVIDERS if target.id.startswith(p.prefix)]
    if not fitting:
        raise ValueError(f"target {target.id!r} has no computation")
    return max(fitting, key=lambda p: len(p.prefix))


def _row(target: Target, found: Mapping[str, Ours] | MissingRecordingError) -> Row:
    reason = EXPECTED_FAILURES.get(target.id, "")
    if isinstance(found, MissingRecordingError):
        return Row(target=target, ours=None, ok=None, skipped=str(found), reason=reason)
    if target.id not in found:
        raise ValueError(f"target {target.id!r} has no computation")
    ours = found[target.id]
    return Row(
        target=target,
        ours=target.value(ours),
        predictions=ours if isinstance(ours, tuple) else None,
        ok=target.accepts(ours),
        reason=reason,
    )


def errors(rows: Sequence[Row], kind: str = "predicted") -> Errors | None:
    """Median and 90th percentile over the rows of one kind; ``None`` if none was computed."""
    found = [r.log_error for r in rows if r.target.kind == kind and r.log_error is not None]
    if not found:
        return None
    return Errors(len(found), float(np.median(found)), float(np.quantile(found, 0.9)))


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order of the file."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.target.group, []).append(row)
    return groups
