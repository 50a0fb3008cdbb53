"""Measure everything and write ``docs/results.md`` and its picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ndp_gym.report import write_whole
from train.results.conditions import CONDITIONS, Measured, measure
from train.results.page import page
from train.results.pictures import learning_curves


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog="python -m train.results", description=__doc__)
    parser.add_argument("--conditions", default=",".join(CONDITIONS), metavar="A,B")
    parser.add_argument("--episodes", type=int, default=32, metavar="N", help="test episodes each")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args(argv)
    names = args.conditions.split(",")
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        measured: list[Measured] = list(pool.map(partial(measure, n_episodes=args.episodes), names))
    drawn = [each.conditions for each in measured if each.conditions != "fix"]
    write_whole(args.out.parent / "img/results-learning.svg", learning_curves(drawn))
    write_whole(args.out, page(measured))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
