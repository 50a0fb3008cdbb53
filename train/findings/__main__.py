"""``python -m train.findings``: measure everything, write ``docs/findings.md``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from ndp_gym.cli import Parser, run_command
from ndp_gym.report import write_whole
from train.findings.measure import BATCH_SIZES, SYSTEMS, Found, measure
from train.findings.necessity import BATCH_SIZE, Necessity, necessity
from train.findings.page import Run, page
from train.findings.recordings import Recording, default_folder, missing, recordings
from train.interrupts import processes

QUICK_WINDOWS, MAX_WINDOWS = 8, 512
PROGRAM = "python -m train.findings"
OUT, QUICK_OUT = Path("docs/findings.md"), Path("runs/findings.md")

Job = tuple[Callable[..., Any], tuple[Any, ...]]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; see `ndp_gym.cli.run_command`."""
    return run_command(PROGRAM, _arguments(argv))


def run(args: argparse.Namespace) -> int:
    """Measure all conditions in worker processes and write the page.

    Raises:
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    for absent in missing(args.recordings):
        print(f"SKIPPED: {absent} is not below {args.recordings}", file=sys.stderr)
    windows = QUICK_WINDOWS if args.quick else MAX_WINDOWS
    with tempfile.TemporaryDirectory() as folder:
        found = list(recordings(args.recordings, Path(folder)))
        results = _results(_jobs(found, windows), args.jobs)
    facts = Run(
        command=PROGRAM + (" --quick" if args.quick else ""),
        minutes=(time.monotonic() - started) / 60,
        jobs=args.jobs,
        quick=args.quick,
        missing=missing(args.recordings),
    )
    out = args.out or (QUICK_OUT if args.quick else OUT)
    write_whole(
        out,
        page(
            facts,
            found,
            [r for r in results if isinstance(r, Found)],
            [r for r in results if isinstance(r, Necessity)],
        ),
    )
    print(f"wrote {out}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Measure everything, write docs/findings.md.")
    parser.set_defaults(func=run)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_WINDOWS} windows a run, into {QUICK_OUT}")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    add("--recordings", type=Path, default=default_folder(), help="third-party recordings")
    add("--out", type=Path, help=f"default: {OUT}")
    return parser.parse_args(argv)


def _jobs(found: Sequence[Recording], windows: int) -> list[Job]:
    """All that is to be measured, in the order of the page."""
    conditions: list[Job] = [
        (measure, (recording.title, recording.path, system, batch, windows))
        for recording in found
        for system in SYSTEMS
        for batch in recording.batch_sizes(BATCH_SIZES)
    ]
    return conditions + [
        (necessity, (r.title, r.path, min(BATCH_SIZE, r.n_requests))) for r in found
    ]


def _results(jobs: Sequence[Job], n_processes: int) -> list[Any]:
    """Results in the order of ``jobs``; the last ones are started first, being the longest."""
    results: list[Any] = [None] * len(jobs)
    with processes(n_processes) as pool:
        futures = {pool.submit(jobs[i][0], *jobs[i][1]): i for i in reversed(range(len(jobs)))}
        for done, future in enumerate(as_completed(futures), 1):
            index = futures[future]
            results[index] = future.result()
            what = " ".join(str(part) for part in jobs[index][1] if not isinstance(part, Path))
            print(f"[{done}/{len(jobs)}] {what}", file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
