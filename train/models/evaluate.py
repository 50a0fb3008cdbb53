"""One recording: the planner alone, its own agent, that of all models, one that never saw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ndp_gym.agent_file import load_agent
from ndp_gym.policy import Policy
from ndp_gym.rollout import Task
from ndp_gym.scenarios import condition_tasks
from policies.agent import LayerAgent, without_network
from policies.all_far import AllFar
from policies.balance_feedback import BalanceFeedback
from policies.tuned import tuned
from train.models.agents import ALL, BASE, own, without
from train.models.recordings import Recording, profile_of
from train.results.fronts import Gain
from train.results.measure import Run, run, shares_of
from train.results.resampling import Resampling

EPISODE_WINDOWS = 64
EPISODE_SEED = 30_000  # no other script draws episodes with it
PLANNER, UNTUNED, OWN, SHARED, LEFT_OUT = (
    "planner", "untuned", "own agent", "all-models agent", "left-out agent",
)  # fmt: skip
FORECAST, SHARED_FORECAST, LEFT_OUT_FORECAST, REFITTED = (
    "own forecast alone", "all-models forecast alone", "left-out forecast alone",
    "left-out agent with the own forecast",
)  # fmt: skip


class Line(NamedTuple):
    """What is said about one recording.

    Attributes:
        recording: it.
        n_windows, n_conversations: of the evaluation.
        planner: reward of the tuned planner.
        gains: reward of the others over it, by policy.
        shared: reward of the all-models agent over the own one, where there is such an agent.
        real: reward over the planner's on the half that was held out, by policy; no intervals.
        n_real: requests and decode tokens of that half.
    """

    recording: Recording
    n_windows: int
    n_conversations: int
    planner: float
    gains: dict[str, Gain]
    shared: Gain | None
    real: dict[str, float] | None
    n_real: tuple[int, int]


def evaluate(recording: Recording, agents: Mapping[str, Path], split: str, n_episodes: int) -> Line:
    """All policies over the same episodes, drawn under ``rand``; ``agents`` are files by name."""
    policies = _policies(recording, agents)
    tasks = condition_tasks(
        recording.path, conditions="rand", split=split, n_episodes=n_episodes,
        max_windows=EPISODE_WINDOWS, seed=EPISODE_SEED,
    )  # fmt: skip
    shares = shares_of(AllFar(), tasks)
    runs = {name: run(policy, tasks) for name, policy in policies.items()}
    planner, gains, shared = compared(runs, Resampling(shares))
    real, n_real = _on_held_out(recording, policies, n_episodes)
    n_windows = sum(len(each) for each in shares)
    return Line(recording, n_windows, shares[0].shape[1], planner, gains, shared, real, n_real)


def compared(
    runs: Mapping[str, Run], resampling: Resampling
) -> tuple[float, dict[str, Gain], Gain | None]:
    """Reward of the planner, that of the others over it, and of the shared over the own agent."""
    rewards = {name: resampling.means(each.reward) for name, each in runs.items()}
    planner = rewards.pop(PLANNER)
    gains = {name: Gain.of(reward - planner) for name, reward in rewards.items()}
    shared = Gain.of(rewards[SHARED] - rewards[OWN]) if SHARED in rewards else None
    return float(planner[0]), gains, shared


def _policies(recording: Recording, agents: Mapping[str, Path]) -> dict[str, Policy]:
    mine = load_agent(agents[own(recording)])
    found: dict[str, Policy] = {
        PLANNER: tuned(BASE),
        UNTUNED: BalanceFeedback(),
        OWN: LayerAgent.of(mine),
        FORECAST: LayerAgent.of(without_network(mine)),
    }
    for label, alone, name in (
        (SHARED, SHARED_FORECAST, ALL), (LEFT_OUT, LEFT_OUT_FORECAST, without(recording)),
    ):  # fmt: skip
        if name in agents:
            other = load_agent(agents[name])
            found[label] = LayerAgent.of(other)
            found[alone] = LayerAgent.of(without_network(other))
            if label == LEFT_OUT:
                found[REFITTED] = LayerAgent.of(replace(other, forecast=mine.forecast))
    return found


def _on_held_out(
    recording: Recording, policies: Mapping[str, Policy], n_episodes: int
) -> tuple[dict[str, float] | None, tuple[int, int]]:
    """Mean reward over the planner's on the real half, whose profile is that of the other half."""
    if recording.held_out is None or recording.fitted is None:
        return None, (0, 0)
    profile = profile_of(recording.fitted)
    tasks: list[Task] = [
        replace(task, profile=profile, profile_source=f"the other half of {recording.title}")
        for task in condition_tasks(
            recording.held_out, conditions="rand", split="test", n_episodes=n_episodes,
            max_windows=EPISODE_WINDOWS, seed=EPISODE_SEED,
        )
    ]  # fmt: skip
    means = {
        name: float(np.concatenate(run(policy, tasks).reward).mean())
        for name, policy in policies.items()
    }
    planner = means.pop(PLANNER)
    requests = tasks[0].trace.requests
    gains = {name: mean - planner for name, mean in means.items()}
    return gains, (len(requests), int(requests.n_decode.sum()))
