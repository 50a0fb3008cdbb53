"""Who is compared: heuristics with and without tuned constants, and agents, at any price."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ndp_gym.agent_file import Agent, load_agent
from ndp_gym.policy import Policy
from policies.agent import SHIPPED as AGENTS
from policies.agent import LayerAgent
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from policies.tuned import SHIPPED as TUNINGS

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


def tunings_of(conditions: str) -> dict[str, dict[str, Any]]:
    """What ``train.tune`` found there, by heuristic."""
    files = {name: TUNINGS / f"{name}_{conditions}.json" for name in HEURISTICS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


def agent_files(conditions: str) -> list[Path]:
    """Cards of the agents that were trained there, one per seed; for fix: the random ones."""
    found = sorted(AGENTS.glob(f"{'rand' if conditions == 'fix' else conditions}_*.json"))
    return found


def priced_agent(path: Path, price: float) -> LayerAgent:
    """A shipped agent on a planner to which a second is ``price`` times as dear."""
    agent = load_agent(path)
    return LayerAgent.of(replace(agent, base=_dearer(agent.base, price)))


def forecast_alone(agent: Agent) -> LayerAgent:
    """An agent whose network says nothing: the planner it bends, with its fitted forecast."""
    silent = [(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in agent.layers]
    return LayerAgent.of(replace(agent, layers=silent))


def _dearer(constants: Mapping[str, float], price: float) -> dict[str, float]:
    return {**constants, "price": price * constants.get("price", 1.0)}
