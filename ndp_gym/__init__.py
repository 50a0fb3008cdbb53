"""NDP gym: where do the experts live, and at how many bits.

Importing this package registers the environments of `ENV_IDS` with Gymnasium. Everything else is
loaded when it is first used, so that the import stays fast and needs neither numba nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import gymnasium

if TYPE_CHECKING:
    from ndp_gym.evaluation import evaluate
    from ndp_gym.plan import Placement, Plan
    from ndp_gym.policy import Policy, PolicyContext
    from ndp_gym.quality import QualityModel
    from ndp_gym.replay import CacheStats, replay_cache
    from ndp_gym.simulate import transition
    from ndp_gym.specs import GpuSpec, MoESpec, Service, SystemSpec
    from ndp_gym.trace import RoutingTrace

__version__ = "0.1.0.dev0"

__all__ = [
    "ENV_ID",
    "ENV_IDS",
    "CacheStats",
    "GpuSpec",
    "MoESpec",
    "Placement",
    "Plan",
    "Policy",
    "PolicyContext",
    "QualityModel",
    "RoutingTrace",
    "Service",
    "SystemSpec",
    "__version__",
    "evaluate",
    "replay_cache",
    "transition",
]

ENV_ID = "NDPPlacement-v0"
ENV_IDS: dict[str, dict[str, str]] = {
    ENV_ID: {},
    "NDPPlacementRand-v0": {"conditions": "rand"},
    "NDPPlacementHidden-v0": {"conditions": "hidden"},
    "NDPPlacementDrift-v0": {"conditions": "drift"},
}
"""Registered environments and the arguments in which they differ."""

_HOMES = {  # what this package re-exports -> the module that defines it
    "CacheStats": "replay",
    "GpuSpec": "specs",
    "MoESpec": "specs",
    "Placement": "plan",
    "Plan": "plan",
    "Policy": "policy",
    "PolicyContext": "policy",
    "QualityModel": "quality",
    "RoutingTrace": "trace",
    "Service": "specs",
    "SystemSpec": "specs",
    "evaluate": "evaluation",
    "replay_cache": "replay",
    "transition": "simulate",
}


if not TYPE_CHECKING:  # type checkers would otherwise accept every name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for env_id, kwargs in ENV_IDS.items():
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point="ndp_gym.env:NDPPlacementEnv",
            vector_entry_point="ndp_gym.vector:NDPPlacementVectorEnv",
            kwargs=kwargs,
        )
