"""Policies over drawn test episodes, window by window."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndp_gym.policy import Policy
from ndp_gym.rollout import Replayed, Task, run_policy

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one policy reached in every window of every episode.

    Attributes:
        speed: log(T_ref / T), [W] for each of M episodes.
        loss: ΔNLL less that of the reference, nats.
        reward: speed - quality_weight * loss.
        decision_s: mean seconds of a decision.
        services: kinds of service that its plans used.
    """

    speed: list[FloatArray]
    loss: list[FloatArray]
    reward: list[FloatArray]
    decision_s: float
    services: set[str]


def run(policy: Policy, tasks: Sequence[Task]) -> Run:
    """``policy`` over all episodes."""
    speed, loss, reward, seconds = [], [], [], []
    services: set[str] = set()
    for i, task in enumerate(tasks):
        measured = run_policy(policy, task, seed=i)
        speed.append(np.array(measured.terms["throughput"]))
        loss.append(-np.array(measured.terms["quality"]))
        reward.append(speed[-1] - task.quality_weight * loss[-1])
        seconds += measured.decision_s
        services |= measured.services
    return Run(
        speed=speed, loss=loss, reward=reward, decision_s=float(np.mean(seconds)),
        services=services,
    )  # fmt: skip


def shares_of(policy: Policy, tasks: Sequence[Task]) -> list[FloatArray]:
    """[W, C] per episode: the part of a window's tokens that each conversation decodes.

    The schedule counts tokens, not seconds, so that it is the same for every policy.
    """
    conversations = np.unique(np.concatenate([_conversations(task) for task in tasks]))
    found = []
    for i, task in enumerate(tasks):
        windows: list[Replayed] = []
        run_policy(policy, task, seed=i, watch=windows.append)
        found.append(_shares(task, windows, conversations))
    return found


def _shares(
    task: Task, windows: Sequence[Replayed], conversations: NDArray[np.int64]
) -> FloatArray:
    requests = task.trace.requests
    shares = np.zeros((len(windows), len(conversations)))
    for row, window in zip(shares, windows, strict=True):
        live = window.n_rows > 0
        request = np.searchsorted(requests.start, window.first_row[live], side="right") - 1
        column = np.searchsorted(conversations, requests.conversation[request])
        np.add.at(row, column, window.n_rows[live] / window.n_rows.sum())
    return shares


def _conversations(task: Task) -> NDArray[np.int64]:
    order = task.trace.split_requests(task.split) if task.order is None else task.order
    found: NDArray[np.int64] = task.trace.requests.conversation[order]
    return found


def said(name: str, policy: Policy, tasks: Sequence[Task]) -> Run:
    """`run`, with a line about it."""
    start = time.monotonic()
    result = run(policy, tasks)
    mean = np.concatenate(result.reward).mean()
    print(f"{name}: reward {mean:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return result
