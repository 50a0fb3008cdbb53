"""Which agents are trained on which recordings, and one training run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from train.models.recordings import Recording
from train.ppo import Args, train

ALL = "all"
MINIBATCHES = 8  # of an update: as many gradient steps whatever the number of layers
N_STEPS = 32
LANES = 16  # copies of the environment, over all recordings of a run
VAL_EPISODES = 8  # likewise


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained: decode windows of an agent over all its recordings, and seeds."""

    n_windows: int
    seeds: tuple[int, ...]


def updates_of(sizes: Sizes) -> int:
    """Fewest updates of a network: those of an agent of one recording."""
    return -(-sizes.n_windows // (N_STEPS * LANES))


def base_of(conditions: str) -> str:
    """The shipped tuning that agents of these conditions bend; found on the bundled recording."""
    return f"balance_feedback_{conditions}"


def own(recording: Recording) -> str:
    """Name of the agent of this model alone."""
    return f"own_{recording.title}"


def without(recording: Recording) -> str:
    """Name of the agent of all models but this one."""
    return f"without_{recording.title}"


def trained_on(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Agents and their recordings: one per model, one for all, one per model that is left out.

    The costly ones come first, so that two processes end at about the same time.
    """
    found = {own(each): [each] for each in recordings}
    if len(recordings) > 1:
        found[ALL] = list(recordings)
        for each in recordings:
            found[without(each)] = [other for other in recordings if other is not each]
    return dict(sorted(found.items(), key=lambda item: -_cost(item[1])))


def _cost(recordings: Sequence[Recording]) -> float:
    """Experts that a window plans for, on average."""
    return sum(each.shape[0] * each.shape[1] for each in recordings) / len(recordings)


def train_agents(
    name: str,
    recordings: Sequence[Recording],
    out: Path,
    n_windows: int,
    seed: int,
    conditions: Sequence[str],
) -> tuple[dict[str, Path], float]:
    """Train one agent anew under each of ``conditions`` -> their files, seconds.

    PPO's words go to a log in the folder of the agent, ``out / conditions / name_seed``. A forecast
    does not depend on conditions, so that one process fits it once.

    Raises:
        ValueError: a path has a comma, which separates recordings.
    """
    start, paths = time.monotonic(), [str(each.path) for each in recordings]
    if any("," in path for path in paths):
        raise ValueError(f"paths of recordings must have no comma, got {paths}")
    n = len(recordings)
    n_lanes = max(2, LANES // n)
    n_samples = N_STEPS * n_lanes * sum(each.shape[0] for each in recordings)
    found = {}
    for each in conditions:
        folder = out / each / f"{name}_{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        args = Args(
            out=str(folder), trace=",".join(paths), seed=seed, conditions=each, base=base_of(each),
            n_windows=n_windows, eval_every=n_windows, n_lanes=n_lanes, n_steps=N_STEPS,
            minibatch=n_samples // MINIBATCHES, val_episodes=max(2, VAL_EPISODES // n),
            wandb="disabled",
        )  # fmt: skip
        with (folder / "log.txt").open("w") as log, redirect_stdout(log):
            found[each] = train(args)
    return found, time.monotonic() - start
