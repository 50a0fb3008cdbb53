"""Measure everything and write ``docs/results.md`` and its picture."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ndp_gym.provenance import git_commit
from ndp_gym.report import write_whole
from ndp_gym.reward import QUALITY_WEIGHTS
from train.results.conditions import SECTIONS, Measured, measure
from train.results.contenders import Folders
from train.results.opened import note_opening, openings
from train.results.page import TITLES, page
from train.results.pictures import learning_curves

OPENED = Path(__file__).with_name("opened.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m train.results", description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), metavar="A,B",
                        help="conditions, with :speed or :quality another weight")  # fmt: skip
    parser.add_argument("--episodes", type=int, default=32, metavar="N", help="episodes each")
    parser.add_argument("--regret-windows", type=int, default=4, metavar="N",
                        help="windows of a section that regret is over")  # fmt: skip
    parser.add_argument("--split", choices=("val", "test"), default="test",
                        help="val to try the script; every run on test is noted")  # fmt: skip
    parser.add_argument("--why", default="the tables of docs/results.md", metavar="TEXT",
                        help="of opening test, for the note")  # fmt: skip
    parser.add_argument("--agents", type=Path, default=Folders().agents, metavar="DIR",
                        help="rand_0.json or rand_0/best.json ... (shipped)")  # fmt: skip
    parser.add_argument("--tunings", type=Path, default=Folders().tunings, metavar="DIR",
                        help="balance_rand.json ... (shipped)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args(argv)
    sections = args.sections.split(",")
    for section in sections:
        conditions, colon, weight = section.partition(":")
        if conditions not in TITLES or (colon and weight not in QUALITY_WEIGHTS):
            parser.error(
                f"a section must be one of {', '.join(TITLES)}, alone or with one of "
                f":{', :'.join(QUALITY_WEIGHTS)}, got {section!r}"
            )
    commit = git_commit()
    is_test = args.split == "test"
    noted = note_opening(OPENED, commit, args.why) if is_test else openings(OPENED)
    folders = Folders(args.agents, args.tunings)
    job = partial(
        measure, n_episodes=args.episodes, split=args.split, n_regret=args.regret_windows,
        folders=folders,
    )  # fmt: skip
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        measured: list[Measured] = list(pool.map(job, sections))
    drawn = [section for section in sections if ":" not in section]
    write_whole(args.out.parent / "img/results-learning.svg", learning_curves(drawn, folders))
    command = shlex.join(["python", "-m", "train.results", *argv])
    write_whole(args.out, page(measured, args.split, noted, commit, command, folders))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
