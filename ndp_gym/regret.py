"""Regret: how much of the proved upper bound of the reward a row leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ndp_gym.bound import KINDS, window_bound
from ndp_gym.memory import gate_profile
from ndp_gym.rollout import Replayed, Task
from ndp_gym.rows import Entry
from ndp_gym.state import Window

__all__ = ["add_regret", "bounds_of", "recorded_window"]


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


def bounds_of(
    task: Task, windows: Sequence[Replayed], progress: Callable[[int, int], None] | None = None
) -> dict[str, NDArray[np.float64]]:
    """By kind of service, the most that any plan with it can earn in each of ``windows``.

    All policies of the task replay the same windows. Copies arrive for free, so that windows can be
    bounded one by one.
    """
    kinds = KINDS if task.system.far.can_compute else ("fetch",)
    bounds = {kind: np.zeros(len(windows)) for kind in kinds}
    for i, replayed in enumerate(windows):
        for kind in kinds:
            bounds[kind][i] = window_bound(
                recorded_window(task, replayed),
                task.model,
                replayed.system,
                budget_bytes=replayed.budget_bytes,
                quality=task.quality,
                quality_weight=task.quality_weight,
                kinds=(kind,),
            ).reward
        if progress is not None:
            progress(i + 1, len(windows))
    return bounds


def add_regret(entries: Iterable[Entry], bounds: Mapping[str, NDArray[np.float64]]) -> None:
    """Fill in bound and regret of every row the bound covers, by the services it used."""
    anything = _mean_of_largest(bounds.values())
    for entry in entries:
        row, reward = entry.row, entry.row["reward"]
        if entry.measurement is None or reward is None:
            continue
        row["reward_bound_any_service"] = anything
        kinds = entry.measurement.services
        if kinds <= bounds.keys():
            bound = _mean_of_largest(bounds[kind] for kind in kinds)
            row["reward_bound"], row["regret"] = bound, bound - reward


def _mean_of_largest(bounds: Iterable[NDArray[np.float64]]) -> float:
    return float(np.max(list(bounds), axis=0).mean())
