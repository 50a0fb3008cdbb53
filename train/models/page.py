"""``docs/models.md``: one agent for many models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.models.agents import Sizes, base_of, updates_of
from train.models.evaluate import (
    EPISODE_SEED,
    FORECAST,
    LEFT_OUT,
    LEFT_OUT_FORECAST,
    OWN,
    REAL,
    SHARED,
    SHARED_FORECAST,
    UNTUNED,
    Line,
    trained_under,
)
from train.results.fronts import Gain
from train.results.opened import Opening, provenance
from train.results.words import gain_of, seeds_of

AGENTS = OWN, SHARED, LEFT_OUT
FORECASTS = FORECAST, SHARED_FORECAST, LEFT_OUT_FORECAST
COMPARED = UNTUNED, *AGENTS, *FORECASTS
WITHIN = 0.01  # reward, about 1 % of throughput: as near as the all-models agent has to be
OPENING = """\
# One agent for many models

Written by `{command}`; do not edit. All seconds are modeled, all losses predicted.
{trial}
An agent's features are dimensionless and its network is the same for every layer, so it runs on any
model. This page asks what that is worth: agents trained on one model, on all of them at once, and
on all but the one they are then run on.

How to read it. `fix` is the default environment; under `rand` every episode draws another machine,
batch, HBM budget and quality weight; `hidden` and `drift` are that with actual speeds which nobody
is told ([results.md](results.md) has the same on the bundled recording). `fix:quality` prices a nat
at 16 rather than 4, with the agents of `rand`, which saw both. Everything is a difference of
rewards, of which +0.01 is about 1 % of throughput at equal loss, to the *planner* that all agents
bend: `balance_feedback` with the constants that ship for the conditions (`{base}` ...). They were
tuned on the bundled recording and see none of these. *untuned*: its default constants.
*left-out agent*: it was trained on all other recordings of the table; what the train split of its
own says of popularity, and of which experts go together, it is told like everybody. *forecast
alone*: the first seed's agent without its network, which leaves the planner and the fitted forecast
of routing: thirty weights, fitted to all that an agent is trained on, while directions and
intensities come from the recording it is run on.

Agents are trained under the conditions that they are run under, with {seeds}, for {windows:,}
decode windows over all recordings of an agent, in which networks hardly move (as few as {updates}
updates); of before and after, the better on val was taken. All policies decode the same {episodes}
{split} episodes of at most 64 windows per recording and section; 95 % intervals resample episodes,
conversations and, of agents, training seeds, paired (pigeonhole bootstrap).

Where a recording has splits of its own it is used as it is. The others have three or four requests:
they are halved in time, a long **synthetic** recording is drawn from the statistics of the first
half (`ndp-gym trace synthesize --like`; how far that goes: [synthetic.md](synthetic.md)), and
agents are trained and tested on it. The second halves follow in a table of their own, as they are.

## What not to conclude

- Synthetic routing has a recording's popularity, reuse and coupling of layers, not its content.
  Gains on it, most of all those of forecasts, need not be gains on the model.
- The planner was not tuned for these models; where *untuned* is better, tuning it anew may bring
  more than an agent does.
- `rand`, `hidden` and `drift` draw the same batches, budgets and links: they are not three
  independent trials. With so many intervals some lie beside zero by chance.
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
    sections = list(dict.fromkeys(each.section for each in lines))
    opening = OPENING.format(
        command=command, trial=trial, base=base_of(trained_under(sections[0])),
        seeds=seeds_of(len(sizes.seeds)), windows=sizes.n_windows, episodes=n_episodes,
        split=split, updates=updates_of(sizes),
    )  # fmt: skip
    by_section = {name: [each for each in lines if each.section == name] for name in sections}
    parts = (
        _summary(by_section), _recordings(by_section[sections[0]]),
        *(_section(name, each) for name, each in by_section.items()),
        _real(lines), _provenance(noted, commit),
    )  # fmt: skip
    return "\n".join([opening, *(line for part in parts for line in part)]).rstrip() + "\n"


def _summary(by_section: dict[str, list[Line]]) -> Iterator[str]:
    yield "## In short"
    yield ""
    yield "Models on which a row is above the planner, on which no difference is shown, and on"
    yield "which it is below."
    yield ""
    yield from _head(["", *(f"`{name}`" for name in by_section)])
    for label in COMPARED:
        gains = [_gains(each, label) for each in by_section.values()]
        if any(gains):
            yield _row([label, *(_counts(each) if each else "-" for each in gains)])
    yield ""
    for name, lines in by_section.items():
        for label in AGENTS:
            below = [title for title, gain in _gains(lines, label).items() if gain.high < 0]
            if below:
                yield f"- `{name}`: the {label} is below the planner on {', '.join(below)}."
    shared = {
        f"{each.recording.title} (`{name}`)": each.shared
        for name, lines in by_section.items()
        for each in lines
        if each.shared is not None
    }
    if shared:
        far = [case for case, gain in shared.items() if gain.value < -WITHIN]
        but = f"; not of {', '.join(far)}" if far else ""
        yield (
            f"- The {SHARED} is within {WITHIN:g} of the own one in {len(shared) - len(far)} of "
            f"{len(shared)} cases{but}."
        )
    yield ""


def _gains(lines: Sequence[Line], label: str) -> dict[str, Gain]:
    return {each.recording.title: each.gains[label] for each in lines if label in each.gains}


def _counts(gains: dict[str, Gain]) -> str:
    above = sum(gain.low > 0 for gain in gains.values())
    below = sum(gain.high < 0 for gain in gains.values())
    return f"{above} / {len(gains) - above - below} / {below}"


def _recordings(lines: Sequence[Line]) -> Iterator[str]:
    yield "## Recordings"
    yield ""
    yield from _head(["recording", "L x E, top-K", "conversations"])
    for each in lines:
        n_layers, n_experts, top_k = each.recording.shape
        kind = "" if each.recording.held_out is None else " (synthetic)"
        yield _row([
            each.recording.title + kind, f"{n_layers} x {n_experts}, {top_k}",
            str(each.n_conversations),
        ])  # fmt: skip
    yield ""


def _section(name: str, lines: Sequence[Line]) -> Iterator[str]:
    """Reward over the planner's, and what of it is owed to forecasts."""
    yield f"## `{name}`"
    yield ""
    yield from _head(
        ["recording", "windows", "planner", UNTUNED, *AGENTS, f"{SHARED} - {OWN}"]
    )  # fmt: skip
    for each in lines:
        cells = [_cell(each.gains.get(label)) for label in (UNTUNED, *AGENTS)]
        yield _row([
            each.recording.title, str(each.n_windows), f"{each.planner:.4f}", *cells,
            _cell(each.shared),
        ])  # fmt: skip
    yield ""
    yield from _head(["recording", *FORECASTS])
    for each in lines:
        cells = [_cell(each.gains.get(label)) for label in FORECASTS]
        yield _row([each.recording.title, *cells])
    yield ""


def _cell(gain: Gain | None) -> str:
    return "-" if gain is None else gain_of(gain)


def _real(lines: Sequence[Line]) -> Iterator[str]:
    """The halves that nothing was fitted to."""
    labels = (UNTUNED, *AGENTS)
    found = [(each, each.real) for each in lines if each.real is not None]
    if not found:
        return
    yield f"## `{REAL}` on the real halves that were held out"
    yield ""
    yield "Too short for intervals, and for a fitted forecast: they have no train split, so agents"
    yield "expect what the planner expects. Popularity is told from the other half. Means over"
    yield "training seeds."
    yield ""
    yield from _head(["recording", "requests, decode tokens", *labels])
    for each, real in found:
        n_requests, n_tokens = each.n_real
        cells = [f"{real[label]:+.4f}" if label in real else "-" for label in labels]
        yield _row([each.recording.title, f"{n_requests}, {n_tokens}", *cells])
    yield ""


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _row(cells)
    yield "|" + "---|" * len(cells)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(noted: list[Opening], commit: str | None) -> Iterator[str]:
    sentences = (
        f"Episodes are drawn with seed {EPISODE_SEED}. Third-party recordings, what is drawn from",
        "them and the agents of this page are not part of the repository.",
    )
    opened = "Test of real recordings was opened {} times (`train/models/opened.json`)"
    yield from provenance(commit, "", sentences, opened, noted)
