"""The tables of ``docs/findings.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.findings.measure import BATCH_SIZES, BUDGETS, Found, Ratio, Verdict
from train.findings.necessity import Necessity
from train.findings.recordings import Recording
from train.findings.words import (
    NOTHING,
    differs,
    percent,
    rate,
    several,
    spread,
    times,
    why,
)

HEAD = (
    "system", "batch", "ΔNLL ≤", "fastest", "tok/s", "over the next", "x all_far4", "x all in HBM",
    "clairvoyant", "why",
)  # fmt: skip
PREFILL = {
    ("prefill_topk", "noise"): "`prefill_topk`: prompts over noise",
    ("prefill_topk", "popularity"): "prompts over popularity",
    ("prefill_topk", "static_popularity"): "over `static_popularity`",
    ("context_aware", "noise"): "`context_aware`: prompts over noise",
    ("context_aware", "popularity"): "prompts over popularity ",
}
VERDICTS = {1: "helps", 0: "no difference", -1: "hurts"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def recording_section(recording: Recording, found: Sequence[Found]) -> Iterator[str]:
    """Heading, notes and table of one recording."""
    yield f"### {recording.title}"
    yield ""
    yield " ".join(_about(recording, found))
    yield ""
    problems = [f for f in found if f.problem]
    rows = [_cells(f, v) for f in found for v in f.verdicts]
    if rows:
        yield from table(HEAD, rows)
        yield ""
    for system in dict.fromkeys(f.system for f in problems):
        yield f"`{system}`: does not fit. {next(f.problem for f in problems if f.system == system)}"
        yield ""


def _about(recording: Recording, found: Sequence[Found]) -> Iterator[str]:
    yield (
        f"{recording.n_tokens:,} decode tokens of {several(recording.n_requests, 'test request')} "
        f"in {several(recording.n_conversations, 'conversation')}; {'; '.join(recording.notes)}."
    )
    batches = recording.batch_sizes(BATCH_SIZES)
    if list(BATCH_SIZES) != batches:
        yield (
            f"Batch sizes {', '.join(map(str, BATCH_SIZES))} became "
            f"{', '.join(map(str, batches))}: there are no more requests to fill slots."
        )
    rows = [f.rows[0] for f in found if f.rows]
    if rows and rows[0]["gates"] != "recorded":
        yield f"Gate weights: {rows[0]['gates']}."
    if rows and rows[0]["tokens_per_s_ci95"] is None:
        yield "Too few conversations for intervals."
    elif rows:
        yield from (f"{n.capitalize()}." for n in rows[0]["notes"] if n.startswith("intervals"))
    if any(row["n_requests"] < recording.n_requests for row in rows):
        yield f"Runs stop after {max(row['n_windows'] for row in rows)} windows."
    for row in rows[-1:] if batches[-1] > 1 else ():
        live = row["n_tokens"] / (row["n_windows"] * row["window"])
        yield f"At batch {batches[-1]}, {live:.1f} slots are busy on average."


def _cells(found: Found, verdict: Verdict) -> list[str]:
    place = [f"`{found.system}`", str(found.batch_size), f"{verdict.budget:g}"]
    winner = verdict.winner
    if winner is None:
        return [*place, "none is good enough", *[NOTHING] * 6]
    mark = "" if winner["validity"] == "in_range" else " (extrapolated)"
    return [
        *place,
        f"`{winner['policy']}`{mark}",
        f"{rate(winner['tokens_per_s'])}{spread(winner['tokens_per_s_ci95'], rate)}",
        _lead(verdict),
        times(winner["speedup_vs_all_far4"] or 0.0)
        + spread(winner["speedup_vs_all_far4_ci95"], times),
        _over_hbm(verdict),
        _clairvoyant(verdict),
        why(verdict),
    ]


def _lead(verdict: Verdict) -> str:
    if verdict.lead is None or verdict.runner is None:
        return NOTHING
    lead = f"{percent(verdict.lead.value)} %{spread(verdict.lead.ci95, percent)}"
    return f"{lead} over `{verdict.runner['policy']}`"


def _over_hbm(verdict: Verdict) -> str:
    """Speed-up over the faster all-in-HBM row, with that row's loss where it is over the budget."""
    hbm, winner = verdict.hbm, verdict.winner
    if hbm is None or winner is None or hbm["delta_nll_nats"] is None:
        return "does not fit"
    loss = hbm["delta_nll_nats"]
    note = "" if loss <= verdict.budget else f", at {loss:.2f} nats"
    return f"{times(winner['speedup_vs_all_hbm'] or 0.0)}{note}"


def _clairvoyant(verdict: Verdict) -> str:
    if verdict.oracle is None or verdict.winner is None:
        return NOTHING
    ratio = (verdict.oracle["tokens_per_s"] or 0.0) / (verdict.winner["tokens_per_s"] or 1.0)
    return f"`{verdict.oracle['policy']}` x {times(ratio)}"


def prefill_table(recordings: Sequence[Recording], found: Sequence[Found]) -> Iterator[str]:
    """What prompts are worth, one line per recording and batch size."""
    rows = []
    for recording in recordings:
        for batch in recording.batch_sizes(BATCH_SIZES):
            here = [f for f in found if (f.title, f.batch_size) == (recording.title, batch)]
            cells = [_range([f.prefill[k] for f in here if k in f.prefill]) for k in PREFILL]
            rows.append([recording.title, str(batch), *cells])
    yield from table(("recording", "batch", *PREFILL.values()), rows)


def _range(ratios: Sequence[Ratio]) -> str:
    """Smallest and largest ratio over systems, saved nats, and on how many systems which holds."""
    if not ratios:
        return "n/a"
    values = sorted(ratio.value for ratio in ratios)
    text = f"{times(values[0])}..{times(values[-1])}"
    nats = [ratio.nats for ratio in ratios]
    if max(map(abs, nats)) >= 0.001:
        text += f", ΔNLL {min(nats):+.3f}..{max(nats):+.3f}"
    signs = [differs(ratio) for ratio in ratios]
    told = [f"{word} {signs.count(s)}/{len(signs)}" for s, word in VERDICTS.items() if s in signs]
    return f"{text} ({', '.join(told)})"


def necessity_table(found: Sequence[Necessity]) -> Iterator[str]:
    """From which share on nothing needs to be placed, beside what a whole GPU holds."""

    def share(value: float | None) -> str:
        return "at no share tried" if value is None else f"{value:.2f}"

    head = (
        "recording",
        "batch",
        *(f"enough at ΔNLL ≤ {b:g}" for b in BUDGETS),
        "a whole GPU holds",
    )
    yield from table(
        head,
        [
            [n.title, str(n.batch_size), *(share(n.enough[b]) for b in BUDGETS), times(n.gpu_share)]
            for n in found
        ],
    )
