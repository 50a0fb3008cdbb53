"""What the scripts of this folder share: recordings and machines, and episodes drawn there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ndp_gym.commands.evaluate import parse_budget
from ndp_gym.condition import Condition
from ndp_gym.conditions import CONDITIONS, find_conditions
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.policy import Policy
from ndp_gym.quality import QualityModel
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.rollout import Task, run_policy, train_profile


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where policies are trained and scored; every field is an option of the command."""

    out: str
    """folder for what the run writes"""
    seed: int = 0
    """of everything that is drawn"""
    trace: str | None = None
    """recordings, comma-separated (default: the bundled one)"""
    model: str | None = None
    """model preset of all recordings (default: the one that each names)"""
    system: str | None = None
    """system preset"""
    batch_size: int = 8
    """requests decoded at once"""
    window: int = 16
    """decode steps per plan"""
    hbm_budget: str = "0.10"
    """share of 16-bit experts, bytes (8GB) or auto"""
    quality_weight: str = "balanced"
    """speed, balanced, quality, or reward per nat"""
    conditions: str = "fix"
    """what episodes draw their conditions from: fix, rand, hidden or drift"""
    episode_windows: int = 64
    """windows of an episode that is drawn for a score"""
    val_episodes: int = 32
    """episodes drawn on val, the same ones every time; fix: one pass over val instead"""


def tasks_of(setting: Setting, split: str) -> list[Task]:
    """One task per recording.

    Raises:
        ValueError: recording, model and system do not agree, or an option is out of range.
        OSError: a recording cannot be read.
    """
    find_conditions(setting.conditions)
    return [_task(setting, path, split) for path in traces_of(setting)]


def traces_of(setting: Setting) -> list[str | None]:
    """The recordings by path; ``None`` is the bundled one."""
    return list(setting.trace.split(",")) if setting.trace else [None]


def _task(setting: Setting, path: str | None, split: str) -> Task:
    trace = open_trace(path)
    return Task(
        trace=trace, model=find_model(setting.model, trace), system=find_system(setting.system),
        batch_size=setting.batch_size, window=setting.window,
        hbm_budget=parse_budget(setting.hbm_budget), split=split, scheduling="continuous",
        quality=QualityModel(), quality_weight=weight(setting.quality_weight), max_windows=None,
        profile=train_profile(trace),
    )  # fmt: skip


def draw_episodes(
    tasks: Sequence[Task], setting: Setting, rng: np.random.Generator, n_episodes: int
) -> list[Task]:
    """``n_episodes`` of each task: other requests first, other conditions, as agents train on."""
    drawn_from = find_conditions(setting.conditions)
    found = []
    for task in tasks:
        base = Condition(
            system=task.system, batch_size=task.batch_size, hbm_budget=task.hbm_budget,
            quality_weight=task.quality_weight,
        )  # fmt: skip
        requests = task.trace.split_requests(task.split)
        for _ in range(n_episodes):
            order, condition = drawn_from.draw_episode(
                rng, base, requests, task.trace.requests.domain
            )
            episode = task.under(condition, order)
            found.append(replace(episode, max_windows=setting.episode_windows))
    return found


def val_tasks(setting: Setting) -> list[Task]:
    """What scores are made on: val as ``ndp-gym evaluate`` runs it, or the same episodes on it."""
    tasks = tasks_of(setting, "val")
    if find_conditions(setting.conditions) == CONDITIONS["fix"]:
        return tasks
    return draw_episodes(tasks, setting, np.random.default_rng(0), setting.val_episodes)


def window_rewards(policy: Policy, task: Task) -> NDArray[np.float64]:
    """Reward of every window of the task, in its order: windows pair between policies."""
    terms = run_policy(policy, task, seed=0).terms
    return np.array(terms["throughput"]) + task.quality_weight * np.array(terms["quality"])


def weight(text: str) -> float:
    """The quality weight behind a name or a number."""
    try:
        return weight_of(float(text))
    except ValueError:
        return weight_of(text)
