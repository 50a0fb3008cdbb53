"""Regret of rows: to what a clairvoyant search reaches, and to a proved bound, window by window.

All policies of a comparison decode the same tokens in a window, on the same machine and in the same
HBM, whatever happens on the way; so both hold under every kind of conditions. They let copies
arrive for free and are slow, hence a sample of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ndp_gym.bound import WindowBound, window_bound
from ndp_gym.local_search import search
from ndp_gym.plan import FAR, HBM, Placement
from ndp_gym.policy import Policy
from ndp_gym.regret import recorded_window
from ndp_gym.rollout import Replayed, Task, run_policy
from ndp_gym.specs import Service, SystemSpec
from train.results.measure import Run
from train.results.resampling import FloatArray

FIRST, N_ROUNDS = (3.0,), 1  # a quarter of the search's default, as good from these starts


class Sample(NamedTuple):
    """One window: where it is, the most that a plan can earn there, and what a found one does."""

    episode: int
    window: int
    bound: float
    found: float


class Regret(NamedTuple):
    """Mean over the sample and its standard error; nan where a service was not bounded."""

    to_found: tuple[float, float]
    to_bound: tuple[float, float]


def sampled(clairvoyant: Policy, tasks: Sequence[Task], n_windows: int, seed: int) -> list[Sample]:
    """Bound and search in one window each of ``n_windows`` episodes, spread over ``tasks``.

    The search starts from the plan of ``clairvoyant`` and from the optimum of the relaxed problem.
    """
    places = np.linspace(0, len(tasks) - 1, min(n_windows, len(tasks))).astype(np.int64)
    rng = np.random.default_rng(seed)
    found = []
    for episode in places.tolist():
        task, windows = tasks[episode], list[Replayed]()
        run_policy(clairvoyant, task, seed=episode, watch=windows.append)
        window = int(rng.integers(len(windows)))
        found.append(Sample(episode, window, *_best_of(task, windows[window])))
    return found


def _best_of(task: Task, replayed: Replayed) -> tuple[float, float]:
    window = recorded_window(task, replayed)
    bound = window_bound(
        window, task.model, replayed.system, budget_bytes=replayed.budget_bytes,
        quality=task.quality, quality_weight=task.quality_weight,
        kinds=kinds_of(task.system),
    )  # fmt: skip
    planned = replayed.plan.placement
    reached = [
        search(
            window, task.model, replayed.system, budget_bytes=replayed.budget_bytes,
            quality=task.quality, quality_weight=task.quality_weight,
            starts=[planned, relaxed(bound, planned)], first=FIRST, n_rounds=N_ROUNDS,
            service=Service(kind=kind),
        ).reward
        for kind in kinds_of(task.system)
    ]  # fmt: skip
    return bound.reward, max(reached)


def kinds_of(system: SystemSpec) -> tuple[Literal["in_place", "balance", "fetch"], ...]:
    """Services that policies of the comparison choose from."""
    return ("in_place", "balance") if system.far.can_compute else ("fetch",)


def relaxed(bound: WindowBound, else_: Placement) -> Placement:
    """What the relaxed optimum pins, and the widths of ``else_`` for what it leaves far."""
    is_pinned = bound.pinned > 0
    return Placement(
        tier=np.where(is_pinned, HBM, FAR).astype(np.uint8),
        bitwidth=np.where(is_pinned, bound.pinned, else_.bitwidth).astype(np.uint8),
    )


def regret_of(runs: Sequence[Run], sample: Sequence[Sample], kinds: Sequence[str]) -> Regret:
    """Of a row, over its runs; ``kinds`` of service are those the sample was bounded for."""
    if not sample or any(not run.services <= set(kinds) for run in runs):
        return Regret((np.nan, np.nan), (np.nan, np.nan))
    earned = np.array([[run.reward[s.episode][s.window] for s in sample] for run in runs])
    found, bound = (np.array([getattr(s, name) for s in sample]) for name in ("found", "bound"))
    return Regret(*(_mean(most - earned.mean(axis=0)) for most in (found, bound)))


def _mean(values: FloatArray) -> tuple[float, float]:
    """Mean and its standard error, nan of a single value."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(error)
