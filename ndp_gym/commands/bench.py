"""``ndp-gym bench``: how fast the simulator is on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndp_gym.bench import BenchRow


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the simulator's speed",
        description="Measure the simulator's speed, each figure beside a baseline of the same run.",
    )
    parser.add_argument("--json", metavar="F", type=Path, help="write the rows to F")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print each row as soon as it is measured; write the JSON at the end."""
    from rich.console import Console

    from ndp_gym.bench import rows
    from ndp_gym.report import check_writable, write_whole

    if args.json:
        check_writable(args.json)
    console = Console()
    found = []
    for row in rows():
        found.append(row)
        console.print(_line(row), highlight=False)
    if args.json:
        write_whole(args.json, json.dumps({"rows": [row.as_dict() for row in found]}, indent=2))
        console.print(f"Wrote {args.json}")
    return 0


def _line(row: BenchRow) -> str:
    text = f"{row.name}: {_number(row.value)} {row.unit}"
    if row.baseline is None:
        return text + (f" ({row.baseline_name})" if row.baseline_name else "")
    baseline = f"{row.baseline_name}: {_number(row.baseline)} {row.unit}"
    return f"{text} ({baseline}, ratio {row.ratio:.3g})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
