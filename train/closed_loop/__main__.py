"""``python -m train.closed_loop``: measure on the bundled model, write ``docs/quality.md``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ndp_gym import presets
from ndp_gym.inputs import DEFAULT_SYSTEM, bundled_trace_path, find_model, open_trace
from ndp_gym.quality import QualityModel
from ndp_gym.report import write_whole
from ndp_gym.reward import quality_weight
from ndp_gym.rollout import Task, train_profile
from traces.minimoe import weights
from train.closed_loop import bitmaps, closed, maps, page, plots, summary
from train.closed_loop.cache import Cache
from train.closed_loop.copies import Copies
from train.closed_loop.tokens import read_tokens

WEIGHTS = Path(__file__).resolve().parents[2] / "traces/minimoe_weights.safetensors"


def bundled_task() -> Task:
    """The conditions of the demo."""
    trace = open_trace(bundled_trace_path())
    return Task(
        trace=trace,
        model=find_model(None, trace),
        system=presets.system(DEFAULT_SYSTEM),
        batch_size=8,
        window=16,
        hbm_budget=0.10,
        split="test",
        scheduling="continuous",
        quality=QualityModel(),
        quality_weight=quality_weight("balanced"),
        max_windows=None,
        profile=train_profile(trace),
    )


def study(cache: Cache, report: Callable[[str], None]) -> page.Study:
    """Both parts on the bundled model and recording."""
    task, source = bundled_task(), weights.load(WEIGHTS)
    trace, n_rows = task.trace, bitmaps.N_TOKENS
    test, train = trace.split_requests("test"), trace.split_requests("train")
    answers = read_tokens(trace, source.model, test, cache, report)
    train_texts = list(read_tokens(trace, source.model, train, cache, report, n_rows).values())
    copies = Copies(source.model)

    found = bitmaps.sensitivity(bitmaps.Losses(copies, train_texts, cache), report)
    share, train_share = (bitmaps.energy(trace, part, n_rows) for part in (test, train))
    popularity = train_share / train_share.sum(axis=1, keepdims=True)
    candidates = [
        *maps.equal_bits(popularity, popularity * found.widths[:, -1:]),
        *maps.uniform(copies.shape),
        *bitmaps.policy_maps(task, cache, report),
    ]
    losses = bitmaps.Losses(copies, [text[:n_rows] for text in answers.values()], cache)
    ways = bitmaps.predictors(
        task.model, task.system.format, copies.relative_error, found, share, train_share
    )
    measured = bitmaps.measure(losses, candidates, ways, report)
    loops = closed.Study(task, copies, answers, cache, report).compare()
    return page.Study(
        measured=measured,
        verdicts=summary.verdicts(measured),
        sensitivity=found,
        loops=loops,
        system=task.system.name,
    )


def _report(line: str) -> None:
    print(f"{time.strftime('%X')}  {line}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts on one core (about 20 minutes) and write page, table and pictures."""
    parser = argparse.ArgumentParser(prog="python -m train.closed_loop", description=main.__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs"), help="folder of the page (default: docs)")
    add("--cache", type=Path, default=Path("runs/closed_loop"),
        help="what was measured before lies here; delete it to measure anew")  # fmt: skip
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    done = study(
        Cache(args.cache), lambda line: print(f"{time.strftime('%X')}  {line}", flush=True)
    )
    files = {
        "quality.md": page.page(done),
        "quality_maps.csv": page.maps_csv(done.measured),
        **{
            f"img/{name}": text
            for name, text in plots.draw(done.measured, done.verdicts, done.loops).items()
        },
    }
    for name, text in files.items():
        write_whole(args.out / name, text)
        print(f"wrote {args.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
