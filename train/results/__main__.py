"""Measure everything and write ``docs/results.md`` and its picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ndp_gym.cli import Parser, run_command
from ndp_gym.inputs import check_integer
from ndp_gym.provenance import git_commit
from ndp_gym.report import check_writable, write_whole
from train.interrupts import processes
from train.results.conditions import SECTIONS, Measured, measure, sections_of
from train.results.contenders import Folders
from train.results.opened import command_of, note_opening, openings
from train.results.page import page
from train.results.pictures import learning_curves

OPENED = Path(__file__).with_name("opened.json")
PAGE = Path("docs/results.md")
PROGRAM = "python -m train.results"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; see `ndp_gym.cli.run_command`."""
    return run_command(PROGRAM, _parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the comparison.

    Raises:
        ValueError: an option is out of range, or a file is none of ``train.tune`` or ``train.ppo``.
        OSError: a file cannot be read or written.
    """
    check(args)
    folders, sections = Folders(args.agents, args.tunings), sections_of(args.sections)
    out = args.out or PAGE
    commit = git_commit()
    is_test = args.split == "test"
    noted = note_opening(OPENED, commit, args.why) if is_test else openings(OPENED)
    job = partial(
        measure, n_episodes=args.episodes, split=args.split, n_regret=args.regret_windows,
        folders=folders,
    )  # fmt: skip
    with processes(args.jobs) as pool:
        measured: list[Measured] = list(pool.map(job, sections))
    drawn = [section for section in sections if ":" not in section]
    write_whole(out.parent / "img/results-learning.svg", learning_curves(drawn, folders))
    command = command_of(_parser(), args)
    write_whole(out, page(measured, args.split, noted, commit, command, folders))
    print(f"wrote {out}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be compared before test is opened.

    Raises:
        ValueError: an option is out of range, or does not fit the others.
        OSError: there is no such folder, or the page cannot be written.
    """
    is_own = Folders(args.agents, args.tunings) != Folders()
    if args.out is None and (args.split != "test" or is_own):
        raise ValueError(
            f"--out must name another page than {PAGE} for a trial or for your own files"
        )
    for folder in (args.agents, args.tunings):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    sections_of(args.sections)
    for name, least in (("episodes", 1), ("regret_windows", 0), ("jobs", 1)):
        check_integer(name, getattr(args, name), least=least)
    check_writable(args.out or PAGE)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.set_defaults(func=run)
    add = partial(parser.add_argument, metavar="X")
    add("--sections", default=",".join(SECTIONS),
        help="conditions, with :speed or :quality another weight (%(default)s)")  # fmt: skip
    add("--episodes", type=int, default=32, help="of every section (%(default)s)")
    add("--regret-windows", type=int, default=4,
        help="windows of a section that regret is over (%(default)s)")  # fmt: skip
    add("--why", default=f"the tables of {PAGE}", help="of opening test, for the note")
    add("--agents", type=Path, default=Folders().agents,
        help="folder of rand_0.json or rand_0/best.json ... (%(default)s)")  # fmt: skip
    add("--tunings", type=Path, default=Folders().tunings,
        help="folder of balance_rand.json ... (%(default)s)")  # fmt: skip
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--out", type=Path, help=f"the page ({PAGE}, of test and of what ships only)")
    parser.add_argument("--split", choices=("val", "test"), default="test",
                        help="val to try the script; every run on test is noted")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
