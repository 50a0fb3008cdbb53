"""All policies under one kind of conditions, on the same test episodes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ndp_gym.agent_file import load_agent
from ndp_gym.policy import Policy, resolve
from ndp_gym.scenarios import condition_tasks
from policies.agent import SHIPPED as AGENTS
from policies.agent import LayerAgent
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from policies.tuned import SHIPPED as TUNINGS
from train.results.fronts import (
    PRICES,
    Curve,
    Gain,
    curve_of,
    curve_over_seeds,
    gain_at_equal_loss,
)
from train.results.measure import Run, said, shares_of
from train.results.resampling import FloatArray, Resampling

CONDITIONS = ("fix", "rand", "hidden", "drift")
EPISODE_WINDOWS = 64
EPISODE_SEED = 20_000  # no other script draws test episodes with it
UNTUNED = ("all_far", "ema", "balance", "balance_feedback", "oracle_balance")
HEURISTICS = {"balance": Balance, "balance_feedback": BalanceFeedback}


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the policy.
        speed, loss, reward: [R] replicates of the means over windows.
        gain: reward over the best tuned heuristic's.
        equal: throughput over the best tuned heuristic's at equal loss.
        won: share of the episodes with a higher reward than it.
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
    decision_s: float
    seeds: tuple[float, ...] = ()


class Measured(NamedTuple):
    """Everything that is said about one kind of conditions."""

    conditions: str
    n_episodes: int
    n_conversations: int
    best: str
    rows: list[Row]
    curve: Curve
    agents_curve: Curve | None
    tunings: dict[str, dict[str, Any]]


def measure(name: str, n_episodes: int) -> Measured:
    """Run all policies over ``n_episodes`` test episodes drawn from the conditions ``name``."""
    tasks = condition_tasks(
        conditions=name, split="test", n_episodes=n_episodes, max_windows=EPISODE_WINDOWS,
        seed=EPISODE_SEED,
    )  # fmt: skip
    resampling = Resampling(shares_of(resolve("all_far")(), tasks))
    tunings = {h: _tuning(h, name) for h in HEURISTICS}
    best = max(tunings, key=lambda h: float(tunings[h]["scores"]["reward"]))
    print(f"{name}: best tuned heuristic on val is {best}", flush=True)
    runs = {h: said(h, resolve(h)(), tasks) for h in UNTUNED}
    runs |= {f"{h}, tuned": said(f"{h}, tuned", tuned(h, tunings), tasks) for h in HEURISTICS}
    priced = [
        runs[f"{best}, tuned"] if price == 1 else
        said(f"{best}, tuned, price x {price:g}", tuned(best, tunings, price), tasks)
        for price in PRICES
    ]  # fmt: skip
    agents = [
        [said(f"{p.stem}, price x {price:g}", priced_agent(p, price), tasks) for price in PRICES]
        for p in agent_files(name)
    ]
    yardstick, curve = runs[f"{best}, tuned"], curve_of(priced, resampling)
    rows = [row_of(label, [found], yardstick, curve, resampling) for label, found in runs.items()]
    theirs: Curve | None = None
    if agents:
        asked = [by_price[PRICES.index(1.0)] for by_price in agents]
        rows.append(row_of("layer agents", asked, yardstick, curve, resampling))
        theirs = curve_over_seeds(list(zip(*agents, strict=True)), resampling)
    n_conversations = resampling.shares[0].shape[1]
    return Measured(
        name, n_episodes, n_conversations, f"{best}, tuned", rows, curve, theirs, tunings
    )


def agent_files(conditions: str) -> list[Path]:
    """Cards of the agents that were trained there, one per seed; for fix: the random ones."""
    found = sorted(AGENTS.glob(f"{'rand' if conditions == 'fix' else conditions}_*.json"))
    return found


def priced_agent(path: Path, price: float) -> LayerAgent:
    """A shipped agent on a planner to which a second is ``price`` times as dear."""
    agent = load_agent(path)
    base = {**agent.base, "price": price * agent.base.get("price", 1.0)}
    return LayerAgent.of(replace(agent, base=base))


def tuned(name: str, tunings: dict[str, dict[str, Any]], price: float = 1.0) -> Policy:
    """The heuristic with its tuned constants, a second ``price`` times as dear."""
    constants = dict(tunings[name]["constants"])
    constants["price"] *= price
    policy: Policy = HEURISTICS[name](**constants)
    return policy


def _tuning(name: str, conditions: str) -> dict[str, Any]:
    path = TUNINGS / f"{name}_{conditions}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def row_of(name: str, runs: list[Run], yardstick: Run, curve: Curve, resampling: Resampling) -> Row:
    """A row from the runs of a policy, one per training seed."""
    if len(runs) > 1:
        over = resampling.means_over_seeds
        speed, loss, reward = (
            over([getattr(run, field) for run in runs]) for field in ("speed", "loss", "reward")
        )
    else:
        (one,) = runs
        speed, loss, reward = map(resampling.means, (one.speed, one.loss, one.reward))
    theirs = resampling.means(yardstick.reward)
    per_episode = np.mean([[r.mean() for r in run.reward] for run in runs], axis=0)
    return Row(
        name=name,
        speed=speed,
        loss=loss,
        reward=reward,
        gain=Gain.of(reward - theirs),
        equal=gain_at_equal_loss(loss, speed, curve),
        won=float((per_episode > [r.mean() for r in yardstick.reward]).mean()),
        decision_s=float(np.mean([run.decision_s for run in runs])),
        seeds=tuple(float(resampling.means(run.reward)[0]) for run in runs)
        if len(runs) > 1
        else (),
    )
