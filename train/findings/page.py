"""``docs/findings.md`` as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ndp_gym.provenance import git_commit, package_versions
from train.findings.measure import BUDGETS, HBM_BUDGET, OPTIONS, SYSTEMS, WINDOW, Found, variants
from train.findings.necessity import CONTEXT, SHARES, SYSTEM, WINDOWS, Necessity
from train.findings.recordings import Recording
from train.findings.summary import short_answers, winners_table
from train.findings.tables import necessity_table, prefill_table, recording_section

GRID = f"""\
ndp-gym trace import ../shared/traces/angerybob__HD-MoE/expert_trace/mixtral --out runs/mixtral.safetensors
ndp-gym evaluate --trace runs/mixtral.safetensors --policies all --seeds 5 --batch-size 1,2,4,8,16 \\
    --system {",".join(SYSTEMS)} --out runs/grid"""  # noqa: E501


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the page was made."""

    command: str
    minutes: float
    jobs: int
    quick: bool
    missing: list[str]


def page(
    run: Run,
    recordings: Sequence[Recording],
    found: Sequence[Found],
    necessity: Sequence[Necessity],
) -> str:
    """The whole page."""
    return "\n".join(_lines(run, recordings, found, necessity)).rstrip() + "\n"


def _lines(
    run: Run,
    recordings: Sequence[Recording],
    found: Sequence[Found],
    necessity: Sequence[Necessity],
) -> Iterator[str]:
    yield from _opening(run)
    yield "## Short answers"
    yield ""
    yield from (f"- {answer}" for answer in short_answers(found, necessity))
    yield ""
    yield from winners_table(found)
    yield ""
    yield "## Where prefill context helps"
    yield ""
    yield _PREFILL
    yield ""
    yield from prefill_table(recordings, found)
    yield ""
    yield "## Where placement is unnecessary"
    yield ""
    yield _NECESSITY
    yield ""
    yield from necessity_table(necessity)
    yield ""
    yield "## Who wins at equal quality, and why"
    yield ""
    yield _TABLES
    yield ""
    for recording in recordings:
        here = [f for f in found if f.title == recording.title]
        yield from recording_section(recording, here)
    yield "## Run it yourself"
    yield ""
    yield "All policies, five batch sizes, three systems, five seeds on the Mixtral recording:"
    yield ""
    yield f"```\n{GRID}\n```"


def _opening(run: Run) -> Iterator[str]:
    versions = "; ".join(f"{name} {version}" for name, version in package_versions().items())
    yield "# Findings"
    yield ""
    yield (
        f"Written by `{run.command}` (commit {git_commit() or 'unknown'}; {versions}; "
        f"{run.minutes:.1f} minutes in {run.jobs} processes). Every number is modeled, not "
        f"measured, and comes from recorded routing."
    )
    yield ""
    if run.quick:
        yield "**Quick run of a few windows per policy; do not quote it.**"
        yield ""
    for absent in run.missing:
        yield f"**Skipped: {absent}.**"
        yield ""
    yield (
        f"HBM holds {HBM_BUDGET:g} of all routed-expert bytes at 16 bit; windows of {WINDOW} "
        f"steps; test requests only. {len(variants()) + 3} rows compete in every condition: every "
        f"registered policy and variants of "
        f"{', '.join(f'`{name}`' for name in OPTIONS)} "
        f"that trade quality for speed. A policy counts with its fastest variant "
        f"within the quality budget ({' and '.join(f'{b:g}' for b in BUDGETS)} nats), chosen on "
        f"the same requests, which favours policies with more variants."
    )
    yield ""


_PREFILL = """\
The same policy is shown prompts, popularity on the train split, or noise, so that only the ranking
of experts differs, not how many are placed at which widths. Ratios of tokens per second, smallest
and largest over the systems; in brackets, on how many systems it helps (2 % or more, and an
interval, where there is one, that leaves out 1). ΔNLL is what the prompts change in nats. The third
column compares the two policies as they are; they also differ in how many experts they place,
since `prefill_topk` takes equally many per layer and rounds down."""

_NECESSITY = f"""\
The smallest share of HBM (tried: {", ".join(f"{s:.2f}" for s in SHARES)} of the 16-bit expert
bytes) at which the fastest row within the quality budget serves everything from HBM, on `{SYSTEM}`,
{WINDOWS} windows. The last column is the share that the GPU of that system could hold if it served
nothing else ({CONTEXT} tokens of context per request): where it exceeds the columns before it,
placement is unnecessary in practice."""

_TABLES = """\
*Fastest* leaves out policies that see the future; the fastest of those stands under *clairvoyant*,
as a multiple of the winner. *Over the next* is the lead over the best other policy. *x all in HBM*
is the winner's speed over the faster row with all experts in HBM, with that row's ΔNLL where it is
over the budget, so that it is no alternative. *Why* takes the lead apart (`ndp-gym explain`, ms per
token, parts below a fifth of the lead left out), the winner's numbers first. *Work* is the time of
GPU and far device as it follows from where experts are served; fewer hits can mean less of it,
where small batches are as fast far away. Brackets are 95 % intervals by blocks of conversations
that decoded together, paired where two rows are compared."""
