"""A trained agent from a file, beside the heuristics: ``agent:path=runs/ppo/best``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ndp_gym.agent_file import Agent, load_agent
from ndp_gym.layer_agents import LayerAgents
from ndp_gym.layer_forecast import learned_of
from ndp_gym.plan import Placement, Plan
from ndp_gym.policy import Observation, PolicyContext

SHIPPED = Path(__file__).resolve().parent / "agents"


def find_agent(path: str) -> Agent:
    """The agent whose weights or card is at ``path``, or that ships by this name.

    Raises:
        ValueError: a file is damaged or holds no agent.
        OSError: a file cannot be read.
    """
    is_shipped = (SHIPPED / f"{path}.json").is_file()
    return load_agent(SHIPPED / path if is_shipped else path)


def without_network(agent: Agent) -> Agent:
    """The planner that ``agent`` bends, with its fitted forecast: its network says nothing."""
    silent = [(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in agent.layers]
    return replace(agent, layers=silent)


class LayerAgent:
    """Every layer asks the same network; see `ndp_gym.layer_agents`.

    Args:
        path: of the weights or the card, or the name of one that ships in ``policies/agents``.
        network: ``False`` leaves the planner with the agent's fitted forecast alone.
    """

    def __init__(self, path: str = "rand_0", network: bool = True) -> None:
        """Read the file.

        Raises:
            ValueError: a file is damaged or holds no agent, or ``network`` is no boolean.
            OSError: a file cannot be read.
        """
        if not isinstance(network, bool):
            raise ValueError(f"network must be True or False, got {network!r}")
        agent = find_agent(path)
        self.agent = agent if network else without_network(agent)

    @classmethod
    def of(cls, agent: Agent) -> LayerAgent:
        """The policy of an agent that no file holds yet."""
        policy = cls.__new__(cls)
        policy.agent = agent
        return policy

    def reset(self, context: PolicyContext) -> None:
        """Read the nominal costs and start with an empty memory."""
        self.layers = LayerAgents(
            context.model,
            context.system,
            context.quality,
            context.quality_weight,
            context.window,
            profile=context.profile,
            features=self.agent.features,
            base=self.agent.base,
            learned=learned_of(self.agent.forecast, context.patterns()),
        )
        self.layers.reset(0)

    def __call__(self, observation: Observation) -> Plan:
        """What the network says, without noise."""
        features = self.layers.observe({name: a[None] for name, a in observation.items()})
        tier, bits, order, services = self.layers.decide(self.agent(features).astype(np.float64))
        placement = Placement(tier=tier[0], bitwidth=bits[0])
        return Plan(placement=placement, migration_order=order[0], service=services[0])
