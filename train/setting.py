"""What the scripts of this folder share: recordings and machines, episodes there, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.commands.evaluate import parse_budget
from ndp_gym.conditions import CONDITIONS, find_conditions
from ndp_gym.policy import Policy
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.reward import reward
from ndp_gym.rollout import Measurement, Task, run_policy
from ndp_gym.scenarios import condition_tasks


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


NUMBERS = {
    "seed": "at least 0",
    **dict.fromkeys(("batch_size", "window", "episode_windows", "val_episodes"), "at least 1"),
}
"""What the numbers of `Setting` may be."""


def traces_of(setting: Setting) -> list[str | None]:
    """The recordings by path; ``None`` is the bundled one."""
    return list(setting.trace.split(",")) if setting.trace else [None]


def episodes_of(setting: Setting, split: str, n_episodes: int, seed: int) -> list[Task]:
    """``n_episodes`` on every recording, with other requests first and other conditions each.

    Raises:
        ValueError: recording, model and system do not agree, or an option is out of range.
        OSError: a recording cannot be read.
    """
    return [
        task
        for path in traces_of(setting)
        for task in condition_tasks(
            path, setting.model, setting.system, setting.conditions, split, n_episodes,
            setting.episode_windows, seed, window=setting.window, batch_size=setting.batch_size,
            hbm_budget=parse_budget(setting.hbm_budget),
            quality_weight=weight(setting.quality_weight),
        )
    ]  # fmt: skip


def val_tasks(setting: Setting) -> list[Task]:
    """What scores are made on: val as ``ndp-gym evaluate`` runs it, or the same episodes on it."""
    if find_conditions(setting.conditions) == CONDITIONS["fix"]:
        tasks = episodes_of(setting, "val", 1, 0)
        return [replace(task, order=None, max_windows=None) for task in tasks]
    return episodes_of(setting, "val", setting.val_episodes, 0)


def window_rewards(policy: Policy, task: Task) -> NDArray[np.float64]:
    """Reward of every window of the task, in its order: windows pair between policies."""
    return rewards_of(run_policy(policy, task, seed=0), task)


def rewards_of(run: Measurement, task: Task) -> NDArray[np.float64]:
    """Reward of every window of a run of the task."""
    terms = {name: np.array(values) for name, values in run.terms.items()}
    return np.asarray(reward(terms, task.quality_weight))


def mean_of(rewards: Sequence[NDArray[np.float64]]) -> float:
    """Mean over tasks of the mean over windows: every recording and episode counts the same."""
    return float(np.mean([values.mean() for values in rewards]))


def scores_of(
    rewards: Sequence[NDArray[np.float64]], alone: Sequence[NDArray[np.float64]]
) -> dict[str, Any]:
    """What a card says about a policy on val, beside the one it started from; an array per task."""
    if len(rewards) == 1:
        gain, over = rewards[0] - alone[0], "windows"
    else:
        pairs = zip(rewards, alone, strict=True)
        gain, over = np.array([one.mean() - other.mean() for one, other in pairs]), "episodes"
    return {
        "split": "val",
        "reward": mean_of(rewards),
        "reward_alone": mean_of(alone),
        "gain": float(gain.mean()),
        f"gain_standard_error_over_{over}": float(gain.std(ddof=1) / np.sqrt(len(gain))),
        f"share_of_{over}_won": float((gain > 0).mean()),
    }


def weight(text: str) -> float:
    """The quality weight behind a name or a number."""
    try:
        return weight_of(float(text))
    except ValueError:
        return weight_of(text)
