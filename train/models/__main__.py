"""Make recordings, train agents on one, all and all but one of them, and write docs/models.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import product
from pathlib import Path

from ndp_gym.cli import Parser, run_command
from ndp_gym.inputs import check_integer
from ndp_gym.provenance import git_commit
from ndp_gym.report import check_writable, write_whole
from train.findings.recordings import default_folder
from train.interrupts import processes
from train.models.agents import Sizes, train_agents, trained_on
from train.models.evaluate import evaluate, trained_under
from train.models.page import page
from train.models.recordings import DEFAULT, Recording, make, source_files
from train.results.conditions import SECTIONS, sections_of
from train.results.opened import command_of, note_opening, openings

OPENED = Path(__file__).with_name("opened.json")
PAGE = Path("docs/models.md")
PROGRAM = "python -m train.models"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; see `ndp_gym.cli.run_command`."""
    args = _parser().parse_args(argv)
    return run_command(PROGRAM, args)


def run(args: argparse.Namespace) -> int:
    """All of it.

    Raises:
        ValueError: an option is out of range, or there is no such recording.
        OSError: a file cannot be read or written.
    """
    titles, out = args.models.split(","), args.out or PAGE
    sections, seeds = sections_of(args.sections), _seeds_of(args.seeds)
    for name, least in (("windows", 0), ("episodes", 1), ("jobs", 1)):
        check_integer(name, getattr(args, name), least=least)
    for title in titles:
        source_files(title, args.recordings)
    check_writable(out)
    if args.out is None and args.split != "test":
        raise ValueError(f"--out must name another page than {PAGE} for a trial")
    commit, sizes = git_commit(), Sizes(n_windows=args.windows, seeds=seeds)
    args.runs.mkdir(parents=True, exist_ok=True)
    build = partial(
        make, folder=args.recordings, into=args.runs, n_requests=args.requests, n_tokens=args.tokens
    )
    with processes(args.jobs) as pool:
        recordings = list(pool.map(build, titles))
        print(f"{len(recordings)} recordings in {args.runs}", flush=True)
        agents = _train(pool, recordings, args.runs, sizes, sections)
        noted = openings(OPENED)
        if args.split == "test" and any(each.held_out is None for each in recordings):
            noted = note_opening(OPENED, commit, args.why)
        score = partial(evaluate, agents=agents, split=args.split, n_episodes=args.episodes)
        pairs = list(product(sections, recordings))
        lines = list(pool.map(score, [each for _, each in pairs], [name for name, _ in pairs]))
    command = command_of(_parser(), args)
    text = page(lines, sizes, command, args.split, args.episodes, noted, commit)
    write_whole(out, text)
    print(f"wrote {out}")
    return 0


def _train(
    pool: Executor, recordings: list[Recording], out: Path, sizes: Sizes, sections: Sequence[str]
) -> dict[tuple[str, str], list[Path]]:
    """All agents of all seeds, as many at once as there are processes -> `Files`."""
    conditions = list(dict.fromkeys(map(trained_under, sections)))
    runs = {
        (name, seed): pool.submit(train_agents, name, on, out, sizes.n_windows, seed, conditions)
        for seed in sizes.seeds
        for name, on in trained_on(recordings).items()
    }
    agents: dict[tuple[str, str], list[Path]] = {}
    for (name, seed), run in runs.items():
        found, seconds = run.result()
        for each, path in found.items():
            agents.setdefault((each, name), []).append(path)
        print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    return agents


def _seeds_of(text: str) -> tuple[int, ...]:
    seeds = tuple(int(word) if word.isdecimal() else -1 for word in text.split(","))
    if -1 in seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, commas between, got {text!r}")
    return seeds


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.set_defaults(func=run)
    add = partial(parser.add_argument, metavar="X")
    add("--models", default=",".join(DEFAULT), help="titles, commas between (%(default)s)")
    add("--recordings", type=Path, default=default_folder(), help="folder of third-party files")
    add("--requests", type=int, default=96, help="drawn for a synthetic recording (%(default)s)")
    add("--tokens", type=int, default=256, help="decoded by one on average (%(default)s)")
    add("--sections", default=",".join(SECTIONS),
        help="conditions, with :speed or :quality another weight (%(default)s)")  # fmt: skip
    add("--windows", type=int, default=1024, help="that an agent is trained on (%(default)s)")
    add("--seeds", default="0,1,2,3,4", help="of the training, commas between (%(default)s)")
    add("--episodes", type=int, default=16, help="evaluated per recording (%(default)s)")
    add("--why", default="the tables of docs/models.md", help="of opening test, for the note")
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--runs", type=Path, default=Path("runs/models"), help="folder of recordings and agents")
    add("--out", type=Path, help=f"the page ({PAGE}, of test only)")
    parser.add_argument("--split", choices=("val", "test"), default="test",
                        help="val to try the script; runs on real test data are noted")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
