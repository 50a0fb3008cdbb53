"""NDP gym: where do the experts live, and at how many bits.

Importing this package registers ``NDPPlacement-v0`` with Gymnasium. Everything else is loaded when
it is first used, so that the import stays fast and needs neither numba nor torch.
"""

from importlib import import_module

import gymnasium

__version__ = "0.1.0.dev0"

ENV_ID = "NDPPlacement-v0"

_EXPORTS = {
    "CacheStats": "ndp_gym.cache",
    "GpuSpec": "ndp_gym.specs",
    "MoESpec": "ndp_gym.specs",
    "Placement": "ndp_gym.plan",
    "Plan": "ndp_gym.plan",
    "RoutingTrace": "ndp_gym.trace",
    "Service": "ndp_gym.specs",
    "SystemSpec": "ndp_gym.specs",
    "evaluate": "ndp_gym.evaluate",
    "replay_cache": "ndp_gym.cache",
    "transition": "ndp_gym.simulate",
}

__all__ = ["ENV_ID", "__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="ndp_gym.env:NDPPlacementEnv",
        vector_entry_point="ndp_gym.vector:NDPPlacementVectorEnv",
    )
