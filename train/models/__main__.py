"""Make recordings, train agents on one, all and all but one of them, and write docs/models.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ndp_gym.cli import Parser
from ndp_gym.provenance import git_commit
from ndp_gym.report import write_whole
from train.findings.recordings import default_folder
from train.models.agents import Sizes, train_agent, trained_on
from train.models.evaluate import evaluate
from train.models.page import page
from train.models.recordings import DEFAULT, Recording, make, source_files
from train.results.opened import command_of, note_opening, openings

OPENED = Path(__file__).with_name("opened.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it."""
    parser = _parser()
    args = parser.parse_args(argv)
    titles = args.models.split(",")
    try:
        for title in titles:
            source_files(title, args.recordings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    commit, sizes = git_commit(), Sizes(n_windows=args.windows, seed=args.seed)
    args.runs.mkdir(parents=True, exist_ok=True)
    build = partial(
        make, folder=args.recordings, into=args.runs, n_requests=args.requests, n_tokens=args.tokens
    )
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        recordings = list(pool.map(build, titles))
        print(f"{len(recordings)} recordings in {args.runs}", flush=True)
        agents = _train(pool, recordings, args.runs, sizes)
        noted = openings(OPENED)
        if args.split == "test" and any(each.held_out is None for each in recordings):
            noted = note_opening(OPENED, commit, args.why)
        score = partial(evaluate, agents=agents, split=args.split, n_episodes=args.episodes)
        lines = list(pool.map(score, recordings))
    text = page(lines, sizes, command_of(parser, args), args.split, args.episodes, noted, commit)
    write_whole(args.out, text)
    print(f"wrote {args.out}")
    return 0


def _train(pool: Executor, recordings: list[Recording], out: Path, sizes: Sizes) -> dict[str, Path]:
    """All agents, as many at once as there are processes -> their files by name."""
    runs = {
        name: pool.submit(train_agent, name, on, out, sizes)
        for name, on in trained_on(recordings).items()
    }
    agents = {}
    for name, run in runs.items():
        agents[name], seconds = run.result()
        print(f"{name}: {seconds:.0f} s", flush=True)
    return agents


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m train.models", description=__doc__)
    add = partial(parser.add_argument, metavar="X")
    add("--models", default=",".join(DEFAULT), help="titles, commas between (%(default)s)")
    add("--recordings", type=Path, default=default_folder(), help="folder of third-party files")
    add("--requests", type=int, default=96, help="drawn for a synthetic recording (%(default)s)")
    add("--tokens", type=int, default=256, help="decoded by one on average (%(default)s)")
    add("--windows", type=int, default=6000, help="that an agent is trained on (%(default)s)")
    add("--seed", type=int, default=0, help="of the training (%(default)s)")
    add("--episodes", type=int, default=16, help="evaluated per recording (%(default)s)")
    add("--why", default="the tables of docs/models.md", help="of opening test, for the note")
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--runs", type=Path, default=Path("runs/models"), help="folder of recordings and agents")
    add("--out", type=Path, default=Path("docs/models.md"), help="the page (%(default)s)")
    parser.add_argument("--split", choices=("val", "test"), default="test",
                        help="val to try the script; runs on real test data are noted")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
