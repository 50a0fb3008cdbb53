"""``docs/models.md``: one agent for many models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.models.agents import BASE, Sizes, updates_of
from train.models.evaluate import (
    EPISODE_SEED,
    FORECAST,
    LEFT_OUT,
    LEFT_OUT_FORECAST,
    OWN,
    REFITTED,
    SHARED,
    SHARED_FORECAST,
    UNTUNED,
    Line,
)
from train.results.fronts import Gain
from train.results.opened import Opening, provenance
from train.results.words import gain_of

FORECASTS = FORECAST, SHARED_FORECAST, LEFT_OUT_FORECAST, REFITTED
WITHIN = 0.01  # reward, about 1 % of throughput: as near as the all-models agent has to be
OPENING = """\
# One agent for many models

Written by `{command}`; do not edit. All seconds are modeled, all losses predicted.
{trial}
An agent's features are dimensionless and its network is the same for every layer, so it runs on any
model. This page asks what that is worth: agents trained on one model, on all of them at once, and
on all but the one they are then run on.

How to read it. Rewards are under `rand`: every episode draws another machine, batch, HBM budget and
quality weight; +0.01 is about 1 % of throughput at equal loss. Everything is a difference to the
*planner* that all agents bend, `balance_feedback` with the shipped constants (`{base}`),
which were tuned on the bundled recording and see none of these. *untuned*: its default constants.
*left-out agent*: it was trained on all other recordings of the table; what the train split of its
own says of popularity, and of which experts go together, it is told like everybody. *forecast
alone*: an agent without its network, which leaves the planner and the fitted forecast of routing.
Every agent has one training seed ({seed}) and {windows:,} decode windows over all its recordings,
in which networks hardly move (as few as {updates} updates); its best checkpoint was picked on val.
All policies decode the same {episodes} {split} episodes of at most 64 windows;
95 % intervals resample episodes and conversations, paired (pigeonhole bootstrap), and do not know
how another training seed would do.

Where a recording has splits of its own it is used as it is. The others have three or four requests:
they are halved in time, a long **synthetic** recording is drawn from the statistics of the first
half (`ndp-gym trace synthesize --like`; how far that goes: [synthetic.md](synthetic.md)), and
agents are trained and tested on it. The second halves follow in a table of their own, as they are.

## What not to conclude

- Synthetic routing has a recording's popularity, reuse and coupling of layers, not its content.
  Gains on it, most of all those of forecasts, need not be gains on the model.
- The planner was not tuned for these models; where *untuned* is better, tuning it anew may bring
  more than an agent does.
- One seed per agent: differences between agents of a row are those of one draw each.
- The halves that were held out are a few hundred tokens: read them for their sign at most.
"""


def page(
    lines: Sequence[Line],
    sizes: Sizes,
    command: str,
    split: str,
    n_episodes: int,
    noted: list[Opening],
    commit: str | None,
) -> str:
    """The whole page."""
    trial = "" if split == "test" else f"\n**A trial on {split}, not to be quoted.**\n"
    opening = OPENING.format(
        command=command, trial=trial, base=BASE, seed=sizes.seed, windows=sizes.n_windows,
        episodes=n_episodes, split=split, updates=updates_of(sizes),
    )  # fmt: skip
    parts = (
        _summary(lines), _table(lines), _forecasts(lines), _real(lines), _provenance(noted, commit),
    )  # fmt: skip
    return "\n".join([opening, *(line for part in parts for line in part)]).rstrip() + "\n"


def _summary(lines: Sequence[Line]) -> Iterator[str]:
    yield "## In short"
    yield ""
    for label in (OWN, SHARED, LEFT_OUT, *FORECASTS):
        gains = {each.recording.title: each.gains[label] for each in lines if label in each.gains}
        if gains:
            yield f"- The {label} against the planner: {_verdicts(gains)}."
    shared = {each.recording.title: each.shared for each in lines if each.shared is not None}
    if shared:
        near = [title for title, gain in shared.items() if gain.value >= -WITHIN]
        yield (
            f"- The {SHARED} is within {WITHIN:g} of the own one on {len(near)} of {len(shared)} "
            f"models{_named('; not on', [title for title in shared if title not in near])}."
        )
    yield ""


def _verdicts(gains: dict[str, Gain]) -> str:
    above = [title for title, gain in gains.items() if gain.low > 0]
    below = [title for title, gain in gains.items() if gain.high < 0]
    text = f"above it on {len(above)} of {len(gains)} models"
    return text + _named(", below it on", below) + f", no difference shown on {_rest(gains)}"


def _rest(gains: dict[str, Gain]) -> int:
    return sum(gain.low <= 0 <= gain.high for gain in gains.values())


def _named(before: str, titles: Sequence[str]) -> str:
    return f"{before} {', '.join(titles)}" if titles else ""


def _table(lines: Sequence[Line]) -> Iterator[str]:
    labels = (UNTUNED, OWN, SHARED, LEFT_OUT)
    yield "## Reward over the planner's"
    yield ""
    heads = ["recording", "L x E, top-K", "conversations, windows", "planner", *labels]
    yield _row([*heads, f"{SHARED} - {OWN}"])
    yield "|" + "---|" * (len(heads) + 1)
    for each in lines:
        n_layers, n_experts, top_k = each.recording.shape
        kind = "" if each.recording.held_out is None else " (synthetic)"
        gains = [each.gains.get(label) for label in labels]
        yield _row([
            each.recording.title + kind,
            f"{n_layers} x {n_experts}, {top_k}",
            f"{each.n_conversations}, {each.n_windows}",
            f"{each.planner:.4f}",
            *("-" if gain is None else gain_of(gain) for gain in (*gains, each.shared)),
        ])  # fmt: skip
    yield ""


def _forecasts(lines: Sequence[Line]) -> Iterator[str]:
    """What agents owe to their forecasts."""
    found = [each for each in lines if any(label in each.gains for label in FORECASTS)]
    yield "## What of it is the forecast"
    yield ""
    yield "Reward over the planner's, as above. A forecast has thirty weights, fitted to all that"
    yield "an agent is trained on; directions and intensities come from the recording it is run on."
    yield ""
    yield _row(["recording", *FORECASTS])
    yield "|" + "---|" * (len(FORECASTS) + 1)
    for each in found:
        gains = [each.gains.get(label) for label in FORECASTS]
        cells = ("-" if gain is None else gain_of(gain) for gain in gains)
        yield _row([each.recording.title, *cells])
    yield ""


def _real(lines: Sequence[Line]) -> Iterator[str]:
    """The halves that nothing was fitted to."""
    labels = (UNTUNED, OWN, SHARED, LEFT_OUT)
    found = [(each, each.real) for each in lines if each.real is not None]
    if not found:
        return
    yield "## The same on the real halves that were held out"
    yield ""
    yield "Too short for intervals, and for a fitted forecast: they have no train split, so agents"
    yield "expect what the planner expects. Popularity is told from the other half."
    yield ""
    yield _row(["recording", "requests, decode tokens", *labels])
    yield "|" + "---|" * (len(labels) + 2)
    for each, real in found:
        n_requests, n_tokens = each.n_real
        cells = [f"{real[label]:+.4f}" if label in real else "-" for label in labels]
        yield _row([each.recording.title, f"{n_requests}, {n_tokens}", *cells])
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(noted: list[Opening], commit: str | None) -> Iterator[str]:
    sentences = (
        f"Episodes are drawn with seed {EPISODE_SEED}. Third-party recordings, what is drawn from",
        "them and the agents of this page are not part of the repository.",
    )
    opened = "Test of real recordings was opened {} times (`train/models/opened.json`)"
    yield from provenance(commit, "", sentences, opened, noted)
