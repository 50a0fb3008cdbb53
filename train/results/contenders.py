"""Who is compared: heuristics with and without tuned constants, and agents, at any price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ndp_gym.agent_file import load_agent
from ndp_gym.policy import Policy
from policies.agent import LayerAgent
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from policies.tuned import read_tuning

HEURISTICS = {"balance": Balance, "balance_feedback": BalanceFeedback}
Tunings = Mapping[str, Mapping[str, Any]]


class Heuristic(NamedTuple):
    """One of `HEURISTICS` with the constants it is given; the others are its defaults."""

    name: str
    constants: Mapping[str, float]

    def at(self, price: float = 1.0) -> Policy:
        """The policy, to which a second is ``price`` times as dear."""
        policy: Policy = HEURISTICS[self.name](**_dearer(self.constants, price))
        return policy


def heuristics(tunings: Tunings) -> dict[str, Heuristic]:
    """By the name of their rows: those with default constants, then those with tuned ones."""
    plain = {name: Heuristic(name, {}) for name in HEURISTICS}
    tuned = {
        f"{name}, tuned": Heuristic(name, tuning["constants"]) for name, tuning in tunings.items()
    }
    return plain | tuned


class Folders(NamedTuple):
    """Where files of ``train.ppo`` and ``train.tune`` are read.

    Agents trained under ``rand`` with seed 0 are ``rand_0.json``, or a run's ``rand_0/best.json``.
    """

    agents: Path = Path("policies/agents")
    tunings: Path = Path("policies/tunings")

    def tunings_of(self, conditions: str) -> dict[str, dict[str, Any]]:
        """What ``train.tune`` found there, by heuristic.

        Raises:
            ValueError: a file is none of ``train.tune``.
            OSError: there is no such file.
        """
        files = {name: self.tunings / f"{name}_{conditions}.json" for name in HEURISTICS}
        return {name: read_tuning(str(path))[1] for name, path in files.items()}

    def agent_files(self, conditions: str) -> list[Path]:
        """Cards of the agents that were trained there, one per seed."""
        return sorted(
            path
            for pattern in (f"{conditions}_*.json", f"{conditions}_*/best.json")
            for path in self.agents.glob(pattern)
        )


def priced_agent(path: Path, price: float) -> LayerAgent:
    """A shipped agent on a planner to which a second is ``price`` times as dear."""
    agent = load_agent(path)
    return LayerAgent.of(replace(agent, base=_dearer(agent.base, price)))


def _dearer(constants: Mapping[str, float], price: float) -> dict[str, float]:
    return {**constants, "price": price * constants.get("price", 1.0)}
