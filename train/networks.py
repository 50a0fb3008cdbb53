"""The network that PPO trains and the agent that plays it: one from the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from ndp_gym.agent_file import Agent


def windows_of(model: BaseAlgorithm, steps: int) -> int:
    """Decode windows behind ``steps`` of agents, as SB3 counts them."""
    env: Any = model.get_env()
    return int(steps * env.get_attr("windows_per_step", 0)[0] // env.num_envs)


def agent_of(model: BaseAlgorithm, card: dict[str, Any]) -> Agent:
    """The policy network of ``model`` without its critic and its noise."""
    env: Any = model.get_env()
    agents, forecast = env.get_attr("agents", 0)[0], env.get_attr("forecast", 0)[0]
    return Agent(
        features=agents.features, layers=layers_of(_linear(model)), base=agents.base,
        forecast=forecast, card=card,
    )  # fmt: skip


def layers_of(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, Any]]:
    """Copies of weight and bias of every linear module, in order."""
    return [
        (m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy())
        for m in modules
        if isinstance(m, torch.nn.Linear)
    ]


def take_over(model: BaseAlgorithm, agent: Agent) -> None:
    """Start from the weights of ``agent``; critic and noise stay as they are.

    Raises:
        ValueError: it has other features or sizes than the network of ``model``.
    """
    mine = agent_of(model, {})
    shapes = [[weight.shape for weight, _ in a.layers] for a in (agent, mine)]
    if list(agent.features.items()) != list(mine.features.items()) or shapes[0] != shapes[1]:
        raise ValueError(f"init must have the features and sizes {shapes[1]}, got {shapes[0]}")
    with torch.no_grad():
        for linear, (weights, bias) in zip(_linear(model), agent.layers, strict=True):
            linear.weight.copy_(torch.as_tensor(weights))
            linear.bias.copy_(torch.as_tensor(bias))


def _linear(model: BaseAlgorithm) -> list[torch.nn.Linear]:
    policy: Any = model.policy
    hidden = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    return [*hidden, policy.action_net]
