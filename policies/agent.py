"""A trained agent from a file, beside the heuristics: ``agent:path=runs/ppo/best``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ndp_gym.agent_file import Agent, load_agent
from ndp_gym.layer_agents import LayerAgents
from ndp_gym.layer_forecast import learned_of
from ndp_gym.plan import Placement, Plan
from ndp_gym.policy import Observation, PolicyContext

SHIPPED = Path(__file__).resolve().parent / "agents"


class LayerAgent:
    """Every layer asks the same network; see `ndp_gym.layer_agents`.

    Args:
        path: of the weights or the card, or the name of one that ships in ``policies/agents``.
    """

    def __init__(self, path: str = "rand_0") -> None:
        """Read the file.

        Raises:
            ValueError: the file is damaged or holds no agent.
            OSError: the file cannot be read.
        """
        is_shipped = (SHIPPED / f"{path}.json").is_file()
        self.agent = load_agent(SHIPPED / path if is_shipped else path)

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
