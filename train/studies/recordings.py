"""What both studies share: the recordings, their decode rows, tables, and how a page is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ndp_gym.importers import import_trace
from ndp_gym.inputs import find_model, open_trace
from ndp_gym.report import write_whole
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS
from train.findings.recordings import BUNDLED, SOURCES, default_folder

MIXTRAL = "Mixtral-8x7B"
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Studied:
    """A recording and the model it is of."""

    title: str
    trace: RoutingTrace
    model: MoESpec

    def decode_rows(self, split: str) -> list[IntArray]:
        """Row numbers of the decode tokens of every request of ``split`` that has some."""
        requests = self.trace.requests
        chosen = (requests.split == SPLITS.index(split)) & (requests.n_decode > 0)
        first, last = requests.start + requests.n_prompt, requests.end
        return [np.arange(first[i], last[i]) for i in np.flatnonzero(chosen)]

    def counts(self, ids: npt.NDArray[np.integer]) -> IntArray:
        """Tokens per expert, [L, E], of routed rows [n, L, K]."""
        n_layers, n_experts = self.model.n_layers, self.model.n_experts
        codes = ids.astype(np.int64) + np.arange(n_layers)[:, None] * n_experts
        found = np.bincount(codes.ravel(), minlength=n_layers * n_experts)
        return found.reshape(n_layers, n_experts)


def studied(folder: Path) -> Iterator[Studied]:
    """The bundled recording, then Mixtral where it is below ``folder``; absence is said aloud."""
    bundled = open_trace()
    yield Studied(title=BUNDLED, trace=bundled, model=find_model(None, bundled))
    files = sorted(folder.glob(SOURCES[MIXTRAL]))
    if not files:
        print(f"SKIPPED: {MIXTRAL} needs {folder / SOURCES[MIXTRAL]}", file=sys.stderr)
        return
    trace = import_trace(files).trace
    yield Studied(title=MIXTRAL, trace=trace, model=find_model(None, trace))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, and an empty one after it."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def digits(value: float, n: int = 3) -> str:
    """A number with ``n`` significant digits, without an exponent."""
    return f"{float(f'{value:.{n}g}'):g}"


def write_study(
    name: str,
    opening: str,
    section: Callable[[Studied], Iterator[str]],
    argv: Sequence[str] | None,
) -> int:
    """Write ``docs/studies/<name>.md``: the opening, then a section per recording."""
    parser = argparse.ArgumentParser(prog=f"python -m train.studies.{name}")
    parser.add_argument("--recordings", type=Path, default=default_folder())
    parser.add_argument("--out", type=Path, default=Path(f"docs/studies/{name}.md"))
    args = parser.parse_args(argv)
    sections = [line for recording in studied(args.recordings) for line in section(recording)]
    write_whole(args.out, "\n".join([opening, *sections]).rstrip() + "\n")
    print(f"wrote {args.out}")
    return 0
