"""``docs/validation.md``: the page that shows published against ours, as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ndp_gym.validation import seed
from ndp_gym.validation.recordings import GPT_OSS, MIXTRAL, Recordings
from ndp_gym.validation.results import Row, by_group
from ndp_gym.validation.summary import (
    Validation,
    count_line,
    error_lines,
    fold_cells,
    number,
    ordering_cells,
    ours,
    status,
    tolerance,
)

COMMAND = "ndp-gym validate --write-docs"
SEED_PAPER = "*Context-aware MoE inference on CXL GPU-NDP systems* (arXiv 2512.04476)"

INTRODUCTION = f"""\
# Published against ours

Written by `{COMMAND}`; a test compares this page with what the code computes. Every row is computed
from the project's presets with the cost functions of [the model](model.md), never by a second
simulator.

- **calibrated** rows chose a constant. They show that the form is adequate, not that it predicts.
- **predicted** rows had no part in any fit.
- **bound** rows are one-sided.

The *seed* is the paper this work started from: {SEED_PAPER}.

A row agrees if ours is within the tolerance that was fixed before the code was written. Rows that
are expected to fail are shown failing, with their reason, and are not tuned away."""

RECORDINGS = f"""\
## What you need to recompute it

`ndp-gym validate` needs no network. Some rows need a public recording and are skipped without it.
Download the files below, put them under one folder with the names given, and call
`ndp-gym validate --recordings FOLDER` (files may be gzipped):

| rows | public file | name below the folder |
|---|---|---|
| `seed/…` except `seed/ndp-latency/…` | {MIXTRAL.text} | `{MIXTRAL.below}/` |
| `itl/gpt-oss-120b-mxfp4/…` | {GPT_OSS.text} | `{GPT_OSS.below}` |

Both are under the MIT licence. `ndp-gym trace import` turns them into traces for other uses."""

NOTES = {
    "seed": (
        f"{SEED_PAPER}: simulated by its authors, not measured. "
        "One request at a time, context 1152; hits of "
        "Mixtral-8x7B recordings stand in for Mixtral-8x22B, of which none is public. `eta_n` of "
        "the simulated device and `pi` of its baseline were fitted here. Input and output lengths "
        "behind the ranges of the paper are not published; 128 in, 512 and 2048 out are taken."
    ),
    "quality": (
        "`kappa` = 3.0 is frozen. GGUF formats are taken as uniform group quantizers of the same "
        "stored width, which understates formats that weigh errors by importance. Accuracy of the "
        "seed's policy takes the share of hits as the share of energy and leaves the guard of the "
        "super expert out, since its bit selector gives such an expert more bits."
    ),
    "placement sweep": (
        "Four RTX 4090 and a Xeon; x is the share of CPU time left, normalised by the end points "
        "of each policy. Routing is synthetic, with a skew per expert and one per request: 3 seeds "
        "of 16 requests. Of `uniform` only five of nine shares are published in a form that is at "
        "hand. The floor `f` and both skews were fitted to this sweep."
    ),
    "inter-token latency": (
        "Context 700 is assumed. gpt-oss-120b is bracketed: real routing uses fewer distinct "
        "experts than uniform routing and more than the one small recording."
    ),
    "kernel": "",
    "cpu offload": (
        "One request, empty context. `eta_n` = 0.37 lumps bandwidth and time per layer, so the "
        "gain from removing CPU hits is overstated."
    ),
}

TITLES = {"seed": "The seed: GPU and CXL-NDP", "cpu offload": "CPU offload"}

PLOTS = {
    "seed": "seed",
    "placement sweep": "sweep",
    "inter-token latency": "latency",
    "quality": "quality",
}

LEFT_OUT = """\
## What the seed's comparison leaves out

Every baseline above keeps fp16 experts in HBM. The simplest alternative, all experts in HBM at the
largest width that fits and no far device, is faster in this model wherever it fits. The ratios
above reproduce a publication; they say nothing about usefulness. Tokens per second at batch 1; no
published counterpart:"""


def text(validation: Validation, recordings: Recordings) -> str:
    """The whole page.

    Raises:
        ValueError: A recording is missing, so that rows would be.
    """
    if validation.missing:
        wanted = "; ".join(file.text for file in validation.missing)
        raise ValueError(
            f"the page needs all recordings, missing below {recordings.folder}: {wanted}"
        )
    parts = [INTRODUCTION, _summary(validation), RECORDINGS]
    parts += [_group(name, rows) for name, rows in by_group(validation.rows).items()]
    parts += [_failures(validation), _left_out(recordings), _folds(validation)]
    return "\n\n".join([*parts, _orderings(validation)]) + "\n"


def _summary(validation: Validation) -> str:
    lines = [count_line(validation), *error_lines(validation)]
    listed = []
    for before, line in pairwise(["", *lines]):
        same_list = before.startswith("-") and line.startswith("-")
        listed.append(line if same_list else f"\n{line}")
    return "\n".join(["## Summary", *listed])


def _group(name: str, rows: Sequence[Row]) -> str:
    parts = [f"## {TITLES.get(name, name.capitalize())}"]
    if NOTES[name]:
        parts.append(NOTES[name])
    if name in PLOTS:
        parts.append(f"![{name}](img/validation-{PLOTS[name]}.svg)")
    head = ["target", "source", "published", "ours", "ratio", "kind", "tolerance", "ok"]
    parts.append(_table(head, [_cells(row) for row in rows]))
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    t = row.target
    return [
        f"`{t.id}`: {t.quantity}",
        t.source,
        f"{t.published:g}",
        ours(row),
        number(row.ratio),
        t.kind,
        tolerance(row),
        status(row) if row.ok else f"**{status(row)}**",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _failures(validation: Validation) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in validation.expected_failures:
        by_reason.setdefault(row.reason, []).append(f"`{row.target.id}`")
    lines = [f"- {', '.join(ids)}: {reason}." for reason, ids in by_reason.items()]
    return "\n".join(["## Expected failures", "", *lines])


def _left_out(recordings: Recordings) -> str:
    speeds = seed.known_better(recordings)
    columns = list(next(iter(speeds.values())))
    rows = [
        [name, *(number(values[column]) for column in columns)] for name, values in speeds.items()
    ]
    return f"{LEFT_OUT}\n\n{_table(['row', *columns], rows)}"


def _folds(validation: Validation) -> str:
    head = ["constants", "left out", "fitted without it", "in use", "the rows left out"]
    about = (
        "Each calibrated constant fitted again without one source, and what it then says about "
        "that source. Where all rows come from one publication, its parts stand for sources. The "
        " ratios of the seed's text alone do not tell `eta_n` from `pi`; its Fig. 6 does."
    )
    table = _table(head, [fold_cells(fold) for fold in validation.folds])
    return f"## Without one source\n\n{about}\n\n{table}"


def _orderings(validation: Validation) -> str:
    head = ["comparison", "Kendall tau", "agreement"]
    rows = [ordering_cells(ordering) for ordering in validation.orderings]
    about = "Whether the model ranks as the measurements do; closer pairs are left out."
    return f"## Orderings\n\n{about}\n\n{_table(head, rows)}"
