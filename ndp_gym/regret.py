"""Regret: how much of the proved upper bound of the reward a row leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ndp_gym.bound import window_bound
from ndp_gym.memory import gate_profile
from ndp_gym.rollout import Replayed, Task
from ndp_gym.rows import Entry
from ndp_gym.state import Window

__all__ = ["add_regret", "mean_bound", "recorded_window"]


def recorded_window(task: Task, replayed: Replayed) -> Window:
    """The window of a run as `ndp_gym.simulate.transition` takes it."""
    profile, _ = gate_profile(task.trace, task.model)
    return Window(
        expert_ids=task.trace.expert_ids,
        gate_weights=task.trace.gate_weights,
        first_row=replayed.first_row,
        n_rows=replayed.n_rows,
        context=replayed.context,
        length=task.window,
        gate_profile=profile,
    )


def mean_bound(
    task: Task, windows: Sequence[Replayed], progress: Callable[[int, int], None] | None = None
) -> float:
    """No policy's mean reward over ``windows``, which all policies of the task replay, is higher.

    Copies arrive for free, so the windows are bounded one by one.
    """
    bounds = []
    for i, replayed in enumerate(windows):
        found = window_bound(
            recorded_window(task, replayed),
            task.model,
            task.actual or task.system,
            budget_bytes=replayed.budget_bytes,
            quality=task.quality,
            quality_weight=task.quality_weight,
        )
        bounds.append(found.reward)
        if progress is not None:
            progress(i + 1, len(windows))
    return float(np.mean(bounds))


def add_regret(entries: Iterable[Entry], bound: float) -> None:
    """Fill in bound and regret of every row the bound covers."""
    for entry in entries:
        reward = entry.row["reward"]
        if entry.measurement is None or entry.measurement.prefetches or reward is None:
            continue
        entry.row["reward_bound"], entry.row["regret"] = bound, bound - reward
