"""All policies under one kind of conditions, on the same episodes of one split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ndp_gym.agent_file import load_agent
from ndp_gym.policy import resolve
from ndp_gym.rollout import Task
from ndp_gym.scenarios import condition_tasks
from train.results.contenders import (
    HEURISTICS,
    Heuristic,
    agent_files,
    forecast_alone,
    heuristics,
    priced_agent,
    tunings_of,
)
from train.results.fronts import (
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
        seeds: rewards of an agent's training seeds.
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
    seeds: tuple[float, ...] = ()


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


def measure(section: str, n_episodes: int, split: str, n_regret: int) -> Measured:
    """Run everybody over ``n_episodes`` episodes of ``split``; regret is over ``n_regret``."""
    conditions, _, weight = section.partition(":")
    tasks = _tasks(conditions, weight, split, n_episodes, EPISODE_SEED)
    resampling = Resampling(shares_of(resolve("all_far")(), tasks))
    tunings = tunings_of(conditions)
    known = heuristics(tunings)
    val = _on_val(known, conditions, weight) if weight else {}
    best = _best(tunings, val)
    print(f"{section}: the best heuristic on val is {best}", flush=True)
    runs = {name: said(name, resolve(name)(), tasks) for name in OTHERS}
    runs |= {name: said(name, heuristic.at(), tasks) for name, heuristic in known.items()}
    priced = [
        runs[best] if price == 1 else
        said(f"{best}, price x {price:g}", known[best].at(price), tasks)
        for price in PRICES
    ]  # fmt: skip
    sample = sampled(resolve("oracle_balance")(), tasks, n_regret, EPISODE_SEED)
    kinds = kinds_of(tasks[0].system)
    table = Table(runs[best], curve_of(priced, resampling), resampling, sample, kinds)
    rows = [row_of(name, [found], table) for name, found in runs.items()]
    agents_curve = _add_agents(rows, conditions, tasks, table, (1.0,) if weight else PRICES)
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
    rows: list[Row], conditions: str, tasks: list[Task], table: Table, prices: Sequence[float]
) -> Curve | None:
    """Rows of the agents and of what they are without a network; their curve over ``prices``."""
    files = agent_files(conditions)
    if not files:
        return None
    agents = [
        [said(f"{p.stem}, price x {price:g}", priced_agent(p, price), tasks) for price in prices]
        for p in files
    ]
    silent = [
        said(f"{p.stem}, forecast alone", forecast_alone(load_agent(p)), tasks) for p in files
    ]
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
    theirs = resampling.means(table.best.reward)
    per_episode = np.mean([[r.mean() for r in run.reward] for run in runs], axis=0)
    return Row(
        name=name,
        speed=speed,
        loss=loss,
        reward=reward,
        gain=Gain.of(reward - theirs),
        equal=gain_at_equal_loss(loss, speed, table.curve),
        won=float((per_episode > [r.mean() for r in table.best.reward]).mean()),
        regret=regret_of(runs, table.sample, table.kinds),
        decision_s=float(np.mean([run.decision_s for run in runs])),
        seeds=tuple(float(resampling.means(run.reward)[0]) for run in runs)
        if len(runs) > 1
        else (),
    )
