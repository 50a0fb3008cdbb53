"""``docs/synthetic.md`` as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.synthetic.compare import FLOOR, FLOOR_SHARE, SEED, SPEED_SPLITS, Comparison, Line
from train.synthetic.halves import ENOUGH_CONVERSATIONS, N_SPLITS
from train.synthetic.measures import BATCH_SIZE, MAX_WINDOWS, POLICIES, SYSTEM

_OPENING = f"""\
# Synthetic recordings against real ones

*Written by `python -m train.synthetic`; do not edit.*

`ndp-gym trace synthesize --like` draws a recording from two amplitudes a layer and a dozen shares;
this page says how far that goes. Every recording is halved: by conversation where it has
{ENOUGH_CONVERSATIONS} or more of them, otherwise every request is cut in its middle. A profile is
fitted to one half; requests as many and as long as those of the other half are drawn from it (one
draw, seed {SEED}) and held against that other half.

- **Statistics**: those of the recording's card, of the decode rows, and tokens per second of
  {", ".join(f"`{name}`" for name in POLICIES)} on `{SYSTEM}`, batch {BATCH_SIZE}, at most
  {MAX_WINDOWS} windows of 16 steps. Left out: what a recording is too short for, and what says the
  same twice (domains that are one request each).
- **Tolerance**: half against half. The recording is halved in up to {N_SPLITS} ways (tokens/s:
  {SPEED_SPLITS}); the largest difference of two real halves is the tolerance, but at least {FLOOR}
  or {100 * FLOOR_SHARE:.0f} % of the value (tokens/s: {100 * FLOOR_SHARE:.0f} %). *Strictly* takes
  the difference of the one split that is compared, with the same floor. Where it is above the
  floor, another real half would pass about every second time.
- **Control**: every token and layer takes the experts of a random token of the fitted half. It has
  the popularity of every layer, and no request, domain, time or coupling of layers. It must fail.
"""

_READING = """\
What does not fit: where the held-out half differs from the fitted one in content, no fit can know,
and with one to four requests the tolerance says so only in part. The hottest and the coldest single
experts are missed most often, since all experts of a layer come from one distribution. Use a
synthetic recording for scale, speed and shapes that nobody recorded, not for findings about a
model.
"""


def page(compared: Sequence[Comparison], missing: Sequence[str], minutes: float) -> str:
    """The whole page."""
    return "\n".join(_lines(compared, missing, minutes)).rstrip() + "\n"


def _lines(compared: Sequence[Comparison], missing: Sequence[str], minutes: float) -> Iterator[str]:
    yield _OPENING
    yield "## Summary"
    yield ""
    yield from summary(compared)
    yield ""
    yield from (f"Not measured: {absent}.\n" for absent in missing)
    yield _READING
    yield f"Made in {minutes:.0f} minutes on one core by `python -m train.synthetic`."
    yield ""
    for comparison in compared:
        yield f"## {comparison.title}"
        yield ""
        yield _halving(comparison)
        yield ""
        yield from table(comparison)
        yield ""


def summary(compared: Sequence[Comparison]) -> Iterator[str]:
    """Share of the statistics within tolerance, by recording and together."""
    yield "| recording | statistics | synthetic within | control | strictly: synthetic | control |"
    yield "|---|---|---|---|---|---|"
    rows = [
        (
            c.title,
            len(c.lines),
            *(c.passed(who, narrow=narrow) for narrow in (False, True)
              for who in ("synthetic", "control")),
        )
        for c in compared
    ]  # fmt: skip
    rows.append(("**together**", *(sum(row[i] for row in rows) for i in range(1, 6))))
    for title, n, *passed in rows:
        cells = " | ".join(f"{p} ({100 * p / n:.0f} %)" for p in passed)
        yield f"| {title} | {n} | {cells} |"
    yield ""
    for name, chosen in (("Next-layer recall", "next layer, recall@k"), ("Tokens/s", "tokens/s")):
        found = [line for c in compared for line in c.lines if line.name.startswith(chosen)]
        if not found:
            continue
        ours, theirs = (
            sum(abs(getattr(line, who) / line.real - 1) for line in found) / len(found)
            for who in ("synthetic", "control")
        )
        yield (
            f"- {name}: off by {100 * ours:.1f} % on average; the control by {100 * theirs:.1f} %."
        )


def table(comparison: Comparison) -> Iterator[str]:
    """Real, synthetic and control side by side."""
    yield "| statistic | fitted half | held-out half | synthetic | control | tolerance |"
    yield "|---|---|---|---|---|---|"
    for line in comparison.lines:
        cells = (
            _number(line, line.first),
            _number(line, line.real),
            _marked(line, line.synthetic),
            _marked(line, line.control),
            _number(line, line.tolerance),
        )
        yield f"| {line.name} | {' | '.join(cells)} |"


def _halving(c: Comparison) -> str:
    how = "by conversation" if c.by_conversation else "in time"
    ways = f"{c.n_splits} way{'s' if c.n_splits > 1 else ''}"
    (n_fitted, n_held_out), (fitted, held_out) = c.n_rows, c.n_requests
    return (
        f"Halved {how}, {ways}; fitted to {n_fitted:,} tokens of {fitted} requests, held out "
        f"{n_held_out:,} of {held_out}. Within tolerance: synthetic {c.passed('synthetic')}, "
        f"control {c.passed('control')} of {len(c.lines)}; **bold**: not within."
    )


def _marked(line: Line, value: float) -> str:
    text = _number(line, value)
    return text if line.within(value, line.tolerance) else f"**{text}**"


def _number(line: Line, value: float) -> str:
    if value != value:
        return "none"
    digits = 1 if "tokens/s" in line.name else 2 if "hottest expert" in line.name else 3
    return f"{value:.{digits}f}"
