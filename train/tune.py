"""Tune a heuristic's constants: ``python -m train.tune --policy balance --out runs/tune``.

The cross-entropy method draws constants from a normal distribution (over their logarithm, where the
range says so), scores them on episodes of the train split, and moves the distribution to the best.
Several tunings start from the same point with seeds of their own; the best of them on val is kept,
beside all others and the untuned policy. The budget of each is in windows, by default that of an
agent of ``train.ppo``. The test split is never opened here.

    ndp-gym evaluate --split val --policies tuned:path=runs/tune/balance_fix,balance
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.policy import resolve
from ndp_gym.provenance import git_commit, package_versions
from ndp_gym.report import check_writable, write_whole
from ndp_gym.rollout import Task
from ndp_gym.rules import check_numbers
from train import options, setting
from train.interrupts import held_back, is_stopping, note_in_worker, noted
from train.setting import Setting, episodes_of, mean_of, scores_of, val_tasks, window_rewards

FloatArray = NDArray[np.float64]


class Range(NamedTuple):
    """Where a constant is looked for, and from where the search starts."""

    low: float
    high: float
    start: float
    scale: Literal["linear", "log", "whole"] = "linear"

    def value(self, place: float) -> float:
        """The constant at ``place`` in [0, 1]."""
        if self.scale == "log":
            return float(self.low * (self.high / self.low) ** place)
        found = self.low + place * (self.high - self.low)
        return round(found) if self.scale == "whole" else float(found)

    @property
    def start_place(self) -> float:
        """Where ``start`` is in [0, 1]."""
        if self.scale == "log":
            return float(np.log(self.start / self.low) / np.log(self.high / self.low))
        return (self.start - self.low) / (self.high - self.low)


_BALANCE = {
    "gpu_factor": Range(0.5, 4.0, 1.0, "log"),
    "far_factor": Range(0.5, 4.0, 1.0, "log"),
    "price": Range(0.25, 4.0, 1.0, "log"),
    "hysteresis": Range(0.005, 1.0, 0.05, "log"),
    "migration_cap": Range(0.25, 8.0, 1.0, "log"),
    "min_gain": Range(1e-4, 0.02, 0.002, "log"),
    "moves": Range(0, 1, 1, "whole"),
    "prefill_tokens": Range(8.0, 1024.0, 64.0, "log"),
    "decay": Range(0.3, 0.98, 0.85),
    "floor": Range(0.0, 0.4, 0.12),
    "gates": Range(0.0, 1.0, 0.3),
    "intensity": Range(0.0, 1.5, 0.7),
}
_WIDTHS = {"bits": Range(1, 4, 4, "whole"), "far_bits": Range(1, 4, 4, "whole")}
RANGES: dict[str, dict[str, Range]] = {
    "balance": _BALANCE,
    "balance_feedback": {**_BALANCE, "gain": Range(0.02, 1.0, 0.3, "log")},
    "context_aware": {"bits": Range(1.0, 4.0, 3.0), "alpha": Range(0.0, 1.0, 0.5)},
    "ema": _WIDTHS,
    "prefill_topk": _WIDTHS,
    "static_popularity": _WIDTHS,
}
"""Policy -> constant -> range. Ranges are assumed, wide enough that tunings end inside them."""

_FIRST_SPREAD, _LEAST_SPREAD = 0.25, 0.02  # shares of a range
_ELITE = 0.25
_MOVE = 0.7  # how far the distribution moves to the best of a generation


@dataclass(frozen=True, kw_only=True)
class Args(Setting):
    """What a tuning is; every field is an option of the command."""

    out: str = "runs/tune"
    """folder for <policy>_<conditions>.json"""
    policy: Literal[
        "balance", "balance_feedback", "context_aware", "ema", "prefill_topk", "static_popularity"
    ] = "balance"
    """what is tuned"""
    n_windows: int = 16_000
    """decode windows that each tuning may replay; one generation at least"""
    n_tunings: int = 5
    """tunings, with seeds from --seed on"""
    population: int = 16
    """constants tried per generation"""
    train_windows: int = 192
    """windows per recording on which each of them is scored"""
    jobs: int = 1
    """tunings at the same time, each in a process"""


NUMBERS = {
    **setting.NUMBERS,
    **dict.fromkeys(("n_windows", "n_tunings", "train_windows", "jobs"), "at least 1"),
    "population": "at least 2",
}
"""What the numbers of `Args` may be."""


@dataclass
class Tuning:
    """One run of the cross-entropy method."""

    seed: int
    mean: FloatArray
    spread: FloatArray
    n_windows: int = 0
    train: list[float] = field(default_factory=list)
    """score of the distribution's mean on each generation's episodes; none before the first"""


def tune(args: Args) -> Path:
    """Tune and return the path of the file.

    Raises:
        ValueError: a number is out of range, or recording, machine and conditions do not agree.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: Ctrl-C came before anything was found.
    """
    check_numbers(args, NUMBERS)
    path = Path(args.out) / f"{args.policy}_{args.conditions}.json"
    check_writable(path)
    ranges = RANGES[args.policy]
    held_out, tunings = val_tasks(args), []
    path.parent.mkdir(parents=True, exist_ok=True)
    default = Scored.of(args.policy, held_out)
    print(f"{args.policy} on val: {default.reward:.4f}")
    with noted():
        for tuning in searches(args):
            scored = Scored.of(spec_of(args.policy, ranges, tuning.mean), held_out)
            print(f"tuning {tuning.seed} on val: {scored.reward:.4f}, untuned {default.reward:.4f}")
            tunings.append((tuning, scored))
            _write(path, args, held_out, default, tunings)
    if not tunings:
        raise KeyboardInterrupt
    print(f"wrote {path}")
    return path


def searches(args: Args) -> Iterator[Tuning]:
    """Every tuning that is done, or that Ctrl-C stopped after it found anything."""
    seeds = range(args.seed, args.seed + args.n_tunings)
    if args.jobs == 1:
        found = (search(args, seed) for seed in seeds if not is_stopping())
        yield from (tuning for tuning in found if tuning.train)
        return
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), note_in_worker)
    try:
        with held_back():  # workers start here, and note Ctrl-C when they are ready
            running = [pool.submit(search, args, seed) for seed in seeds]
        for future in running:
            if is_stopping():  # workers may not know, where a signal came to this process alone
                pool.shutdown(wait=False, cancel_futures=True)
            if not future.cancelled() and (tuning := future.result()).train:
                yield tuning
    finally:
        pool.shutdown(cancel_futures=True)


class Scored(NamedTuple):
    """A policy by name and options, and its rewards on val: [W] per episode."""

    spec: str
    rewards: list[FloatArray]

    @classmethod
    def of(cls, spec: str, tasks: Sequence[Task]) -> Scored:
        """Run it."""
        return cls(spec, rewards_of(spec, tasks))

    @property
    def reward(self) -> float:
        """Mean over episodes of the mean over windows."""
        return mean_of(self.rewards)


def search(args: Args, seed: int) -> Tuning:
    """One tuning, until its windows are spent or Ctrl-C."""
    ranges = RANGES[args.policy]
    mean = np.array([r.start_place for r in ranges.values()])
    tuning = Tuning(seed=seed, mean=mean, spread=np.full(len(mean), _FIRST_SPREAD))
    _spend(tuning, args, ranges)
    if is_stopping():
        print(f"seed {seed}: stopped after {tuning.n_windows} windows", flush=True)
    return tuning


def _spend(tuning: Tuning, args: Args, ranges: dict[str, Range]) -> None:
    """Move the distribution, generation by generation; Ctrl-C drops the present one."""
    rng = np.random.default_rng(tuning.seed)
    n_episodes, start = max(1, args.train_windows // args.episode_windows), time.monotonic()
    per_generation = 0
    while tuning.n_windows + per_generation <= args.n_windows:
        before = tuning.n_windows
        episodes = episodes_of(args, "train", n_episodes, int(rng.integers(2**31)))
        places = rng.normal(tuning.mean, tuning.spread, (args.population, len(ranges))).clip(0, 1)
        places[0] = tuning.mean
        scores = np.empty(len(places))
        for i, place in enumerate(places):
            if is_stopping():
                return
            rewards = rewards_of(spec_of(args.policy, ranges, place), episodes)
            scores[i] = mean_of(rewards)
            tuning.n_windows += sum(map(len, rewards))
        best = places[np.argsort(-scores)[: max(2, round(_ELITE * len(places)))]]
        tuning.mean = tuning.mean + _MOVE * (best.mean(axis=0) - tuning.mean)
        spread = tuning.spread + _MOVE * (best.std(axis=0) - tuning.spread)
        tuning.spread = spread.clip(_LEAST_SPREAD, _FIRST_SPREAD)
        tuning.train.append(float(scores[0]))
        per_generation = tuning.n_windows - before
        seconds = time.monotonic() - start
        left = max(args.n_windows - tuning.n_windows, 0) * seconds / tuning.n_windows
        print(
            f"seed {tuning.seed}: {tuning.n_windows:7d}/{args.n_windows} windows {seconds:5.0f} s, "
            f"{left:4.0f} s left  mean {scores[0]:.4f}, best {scores.max():.4f}",
            flush=True,
        )


def rewards_of(spec: str, tasks: Sequence[Task]) -> list[FloatArray]:
    """Rewards of every window, task by task."""
    make = resolve(spec)
    return [window_rewards(make(), task) for task in tasks]


def spec_of(policy: str, ranges: dict[str, Range], places: FloatArray) -> str:
    """The policy's name with the constants at ``places`` as options."""
    constants = (f"{n}={r.value(p)!r}" for (n, r), p in zip(ranges.items(), places, strict=True))
    return f"{policy}:{','.join(constants)}"


def _write(
    path: Path,
    args: Args,
    held_out: Sequence[Task],
    default: Scored,
    tunings: Sequence[tuple[Tuning, Scored]],
) -> None:
    """The best tuning on val, and all of them; the file appears whole or not at all."""
    ranges = RANGES[args.policy]
    best_tuning, best = max(tunings, key=lambda pair: pair[1].reward)
    scores = scores_of(best.rewards, default.rewards)
    scores["reward_untuned"] = scores.pop("reward_alone")
    found = [scored.reward for _, scored in tunings]
    content = {
        "spec": best.spec,
        "constants": _constants(ranges, best_tuning.mean),
        "scores": {
            **scores,
            "spread_of_tunings": float(np.ptp(found)),
            "note": "the best tuning was chosen on val, so its score is optimistic",
        },
        "tunings": [
            {
                "seed": tuning.seed,
                "reward": scored.reward,
                "constants": _constants(ranges, tuning.mean),
                "n_windows": tuning.n_windows,
                "train": [round(score, 4) for score in tuning.train],
            }
            for tuning, scored in tunings
        ],
        "training": {k: v for k, v in asdict(args).items() if k not in ("out", "jobs")},
        "trace_sha256": list(dict.fromkeys(task.trace.sha256 for task in held_out)),
        "commit": git_commit(),
        "versions": dict(package_versions()),
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _constants(ranges: dict[str, Range], places: FloatArray) -> dict[str, Any]:
    return {n: r.value(p) for (n, r), p in zip(ranges.items(), places.tolist(), strict=True)}


if __name__ == "__main__":
    options.run(Args, tune, "Tune the constants of a heuristic on train, and choose on val.")
