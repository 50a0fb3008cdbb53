"""One recording: the planner alone, its own agents, those of all models, some that never saw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.agent_file import load_agent
from ndp_gym.policy import Policy
from ndp_gym.rollout import Task
from ndp_gym.scenarios import condition_tasks
from policies.agent import LayerAgent, without_network
from policies.all_far import AllFar
from policies.balance_feedback import BalanceFeedback
from policies.tuned import tuned
from train.models.agents import ALL, base_of, own, without
from train.models.recordings import Recording, profile_of
from train.results.fronts import Gain
from train.results.measure import Run, run, shares_of
from train.results.resampling import Resampling

EPISODE_WINDOWS = 64
EPISODE_SEED = 30_000  # no other script draws episodes with it
PLANNER, UNTUNED, OWN, SHARED, LEFT_OUT = (
    "planner", "untuned", "own agent", "all-models agent", "left-out agent",
)  # fmt: skip
FORECAST, SHARED_FORECAST, LEFT_OUT_FORECAST = (
    "own forecast alone", "all-models forecast alone", "left-out forecast alone",
)  # fmt: skip
REAL = "rand"
"""The section under which the halves that were held out are run."""

Files = Mapping[tuple[str, str], Sequence[Path]]
"""Agents by the conditions that they were trained under and their name, a file per seed."""


class Line(NamedTuple):
    """What is said about one recording in one section.

    Attributes:
        recording: it.
        section: conditions, with the name of a quality weight where that is another one.
        n_windows, n_conversations: of the evaluation.
        planner: reward of the tuned planner.
        gains: reward of the others over it, by policy.
        shared: reward of the all-models agents over the own ones, where there are such agents.
        real: reward over the planner's on the half that was held out, by policy; no intervals.
        n_real: requests and decode tokens of that half.
    """

    recording: Recording
    section: str
    n_windows: int
    n_conversations: int
    planner: float
    gains: dict[str, Gain]
    shared: Gain | None
    real: dict[str, float] | None
    n_real: tuple[int, int]


def trained_under(section: str) -> str:
    """Conditions of a section's agents: at another quality weight, those that saw all weights."""
    conditions, _, weight = section.partition(":")
    return "rand" if weight else conditions


def evaluate(
    recording: Recording, section: str, agents: Files, split: str, n_episodes: int
) -> Line:
    """All policies over the same episodes, drawn under the conditions of ``section``."""
    policies = _policies(recording, agents, trained_under(section))
    conditions, _, weight = section.partition(":")
    tasks = condition_tasks(
        recording.path, conditions=conditions, split=split, n_episodes=n_episodes,
        max_windows=EPISODE_WINDOWS, seed=EPISODE_SEED, quality_weight=weight or "balanced",
    )  # fmt: skip
    shares = shares_of(AllFar(), tasks)
    runs = {name: [run(policy, tasks) for policy in each] for name, each in policies.items()}
    planner, gains, shared = compared(runs, Resampling(shares))
    real, n_real = None, (0, 0)
    if section == REAL and recording.held_out is not None and recording.fitted is not None:
        held_out = held_out_tasks(recording.held_out, profile_of(recording.fitted), n_episodes)
        real = on_held_out(held_out, policies)
        requests = held_out[0].trace.requests
        n_real = len(requests), int(requests.n_decode.sum())
    n_windows = sum(len(each) for each in shares)
    print(f"ran {recording.title} under {section}", flush=True)
    return Line(
        recording, section, n_windows, shares[0].shape[1], planner, gains, shared, real, n_real
    )


def compared(
    runs: Mapping[str, Sequence[Run]], resampling: Resampling
) -> tuple[float, dict[str, Gain], Gain | None]:
    """Reward of the planner, that of the others over it, and of the shared over the own agents.

    ``runs`` are one per training seed; seeds are resampled too.
    """
    rewards = {
        name: resampling.means_over_seeds([one.reward for one in each])
        if len(each) > 1 else resampling.means(each[0].reward)
        for name, each in runs.items()
    }  # fmt: skip
    planner = rewards.pop(PLANNER)
    gains = {name: Gain.of(reward - planner) for name, reward in rewards.items()}
    shared = Gain.of(rewards[SHARED] - rewards[OWN]) if SHARED in rewards else None
    return float(planner[0]), gains, shared


def _policies(recording: Recording, agents: Files, conditions: str) -> dict[str, list[Policy]]:
    """By row: one policy, or one per training seed; of forecasts that of the first seed."""
    found: dict[str, list[Policy]] = {
        PLANNER: [tuned(base_of(conditions))],
        UNTUNED: [BalanceFeedback()],
    }
    for label, alone, name in (
        (OWN, FORECAST, own(recording)),
        (SHARED, SHARED_FORECAST, ALL),
        (LEFT_OUT, LEFT_OUT_FORECAST, without(recording)),
    ):
        if files := agents.get((conditions, name)):
            loaded = [load_agent(path) for path in files]
            found[label] = [LayerAgent.of(agent) for agent in loaded]
            found[alone] = [LayerAgent.of(without_network(loaded[0]))]
    return found


def held_out_tasks(path: Path, profile: NDArray[np.float64], n_episodes: int) -> list[Task]:
    """Episodes on a real half, whose ``profile`` [L, E] is that of the other half."""
    return [
        replace(task, profile=profile, profile_source="the other half of the recording")
        for task in condition_tasks(
            path, conditions=REAL, split="test", n_episodes=n_episodes,
            max_windows=EPISODE_WINDOWS, seed=EPISODE_SEED,
        )
    ]  # fmt: skip


def on_held_out(
    tasks: Sequence[Task], policies: Mapping[str, Sequence[Policy]]
) -> dict[str, float]:
    """Mean reward over the planner's."""
    means = {
        name: float(np.mean([np.concatenate(run(one, tasks).reward).mean() for one in each]))
        for name, each in policies.items()
    }
    planner = means.pop(PLANNER)
    return {name: mean - planner for name, mean in means.items()}
