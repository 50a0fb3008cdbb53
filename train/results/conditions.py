"""All policies under one kind of conditions, on the same episodes of one split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ndp_gym.conditions import CONDITIONS
from ndp_gym.policy import resolve
from ndp_gym.reward import QUALITY_WEIGHTS
from ndp_gym.rollout import Task
from ndp_gym.scenarios import condition_tasks
from policies.agent import LayerAgent
from train.results.contenders import (
    HEURISTICS,
    Folders,
    Heuristic,
    heuristics,
    priced_agent,
)
from train.results.fronts import (
    AGENT_PRICES,
    PRICES,
    Curve,
    Gain,
    curve_of,
    curve_over_seeds,
    gain_at_equal_loss,
)
from train.results.measure import Run, said, shares_of
from train.results.regret import Regret, Sample, kinds_of, regret_of, sampled
from train.results.resampling import FloatArray, Resampling
from train.setting import mean_of

SECTIONS = ("fix", "fix:quality", "rand", "hidden", "drift")
"""Conditions, each with the name of another quality weight than the tunings' where it has one."""

EPISODE_WINDOWS = 64
EPISODE_SEED = 20_000  # no other script draws test episodes with it
VAL_EPISODES = 16  # drawn to choose the best heuristic at another quality weight
OTHERS = ("all_far", "ema", "oracle_balance")
AGENTS, FORECAST = "layer agents", "forecast alone"


def sections_of(text: str) -> list[str]:
    """Sections by name, commas between.

    Raises:
        ValueError: there are no such conditions, or no such quality weight.
    """
    sections = text.split(",")
    for section in sections:
        conditions, colon, weight = section.partition(":")
        if conditions not in CONDITIONS or (colon and weight not in QUALITY_WEIGHTS):
            raise ValueError(
                f"a section must be one of {', '.join(CONDITIONS)}, alone or with one of "
                f":{', :'.join(QUALITY_WEIGHTS)}, got {section!r}"
            )
    return sections


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the policy.
        speed, loss, reward: [R] replicates of the means over windows.
        gain: reward over the best heuristic's.
        equal: throughput over the best heuristic's at equal loss.
        won: share of the episodes with a higher reward than it.
        regret: on the sample.
        decision_s: seconds per decision.
        rewards: [training seeds, episodes], of agents; one seed for all others.
    """

    name: str
    speed: FloatArray
    loss: FloatArray
    reward: FloatArray
    gain: Gain
    equal: Gain
    won: float
    regret: Regret
    decision_s: float
    rewards: FloatArray

    @property
    def n_seeds(self) -> int:
        """Training seeds of agents, 1 for others."""
        return len(self.rewards)


class Measured(NamedTuple):
    """Everything that is said about one section.

    Attributes:
        section: one of `SECTIONS`.
        best: row that the others are compared with.
        curve, agents_curve: of that row and of the agents, over prices.
        tunings: files of ``train.tune`` by heuristic.
        val: reward on val that ``best`` was chosen by, where that is not in the tunings.
        sample: windows that regret is over.
        trace_sha256: of the recording.
    """

    section: str
    n_episodes: int
    n_conversations: int
    best: str
    rows: list[Row]
    curve: Curve
    agents_curve: Curve | None
    tunings: dict[str, dict[str, Any]]
    val: dict[str, float]
    sample: list[Sample]
    trace_sha256: str

    def row(self, name: str) -> Row | None:
        """The line of a policy, if it has one."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def spread(self) -> float:
        """Of the best heuristic's tunings on val; nan where it was not tuned for the section."""
        tuning = None if self.val else self.tunings.get(self.best.partition(",")[0])
        return float(tuning["scores"]["spread_of_tunings"]) if tuning else np.nan

    @property
    def network(self) -> Gain | None:
        """Reward of the agents over that of their forecast alone."""
        agents, forecast = self.row(AGENTS), self.row(FORECAST)
        return Gain.of(agents.reward - forecast.reward) if agents and forecast else None


class Table(NamedTuple):
    """What every row needs: the best heuristic's run and curve, the resamples, the sample."""

    best: Run
    curve: Curve
    resampling: Resampling
    sample: list[Sample]
    kinds: tuple[str, ...]


def measure(section: str, n_episodes: int, split: str, n_regret: int, folders: Folders) -> Measured:
    """Run everybody over ``n_episodes`` episodes of ``split``; regret is over ``n_regret``.

    At another quality weight than the tunings' the agents are those of ``rand``, which saw it.
    """
    conditions, _, weight = section.partition(":")
    tasks = _tasks(conditions, weight, split, n_episodes, EPISODE_SEED)
    resampling = Resampling(shares_of(resolve("all_far")(), tasks))
    tunings = folders.tunings_of(conditions)
    known = heuristics(tunings)
    val = _on_val(known, conditions, weight) if weight else {}
    best = _best(tunings, val)
    print(f"{section}: the best heuristic on val is {best}", flush=True)
    runs = {name: said(name, resolve(name)(), tasks) for name in OTHERS}
    runs |= {name: said(name, heuristic.at(), tasks) for name, heuristic in known.items()}
    priced = [
        runs[best] if price == 1 else
        said(f"{best}, price x {price:.3g}", known[best].at(price), tasks)
        for price in PRICES
    ]  # fmt: skip
    sample = sampled(resolve("oracle_balance")(), tasks, n_regret, EPISODE_SEED)
    kinds = kinds_of(tasks[0].system)
    table = Table(runs[best], curve_of(priced, resampling), resampling, sample, kinds)
    rows = [row_of(name, [found], table) for name, found in runs.items()]
    files = folders.agent_files("rand" if weight else conditions)
    agents_curve = _add_agents(rows, files, tasks, table, (1.0,) if weight else AGENT_PRICES)
    return Measured(
        section, n_episodes, resampling.shares[0].shape[1], best, rows, table.curve, agents_curve,
        tunings, val, sample, tasks[0].trace.sha256,
    )  # fmt: skip


def _tasks(conditions: str, weight: str, split: str, n_episodes: int, seed: int) -> list[Task]:
    return condition_tasks(
        conditions=conditions, split=split, n_episodes=n_episodes, max_windows=EPISODE_WINDOWS,
        seed=seed, quality_weight=weight or "balanced",
    )  # fmt: skip


def _on_val(known: dict[str, Heuristic], conditions: str, weight: str) -> dict[str, float]:
    """Reward on val at another quality weight than the one that was tuned for."""
    tasks = _tasks(conditions, weight, "val", VAL_EPISODES, 0)
    return {
        name: mean_of(said(f"{name}, val", each.at(), tasks).reward) for name, each in known.items()
    }


def _best(tunings: dict[str, dict[str, Any]], val: dict[str, float]) -> str:
    """The row whose reward on val is the highest; without ``val``, by the tunings' own scores."""
    scores = val or {f"{name}, tuned": tunings[name]["scores"]["reward"] for name in HEURISTICS}
    return max(scores, key=lambda name: scores[name])


def _add_agents(
    rows: list[Row], files: list[Path], tasks: list[Task], table: Table, prices: Sequence[float]
) -> Curve | None:
    """Rows of the agents and of what they are without a network; their curve over ``prices``."""
    if not files:
        return None
    agents = [
        [said(f"{p}, price x {price:.3g}", priced_agent(p, price), tasks) for price in prices]
        for p in files
    ]
    silent = [said(f"{p}, forecast alone", LayerAgent(str(p), network=False), tasks) for p in files]
    rows.append(row_of(AGENTS, [by_price[prices.index(1.0)] for by_price in agents], table))
    rows.append(row_of(FORECAST, silent, table))
    if len(prices) == 1:
        return None
    return curve_over_seeds(list(zip(*agents, strict=True)), table.resampling)


def row_of(name: str, runs: list[Run], table: Table) -> Row:
    """A row from the runs of a policy, one per training seed."""
    resampling = table.resampling
    if len(runs) > 1:
        over = resampling.means_over_seeds
        speed, loss, reward = (
            over([getattr(run, field) for run in runs]) for field in ("speed", "loss", "reward")
        )
    else:
        (one,) = runs
        speed, loss, reward = map(resampling.means, (one.speed, one.loss, one.reward))
    gain = Gain.of(reward - resampling.means(table.best.reward))
    rewards, theirs = _by_episode(runs), _by_episode([table.best])
    return Row(
        name=name,
        speed=speed,
        loss=loss,
        reward=reward,
        gain=gain,
        equal=gain_at_equal_loss(loss, speed, table.curve),
        won=float((rewards.mean(axis=0) > theirs[0]).mean()),
        regret=regret_of(runs, table.sample, table.kinds),
        decision_s=float(np.mean([run.decision_s for run in runs])),
        rewards=rewards,
    )


def _by_episode(runs: Sequence[Run]) -> FloatArray:
    """[runs, episodes] mean rewards."""
    return np.array([[windows.mean() for windows in run.reward] for run in runs])
