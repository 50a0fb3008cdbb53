"""Agents as files anyone may open: weights in safetensors, everything else in a JSON card.

Nothing is unpickled and no torch is needed: an agent is rebuilt from numbers and names that are
checked, and its network runs in numpy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.layer_agents import ACTIONS, base_constants
from ndp_gym.layer_features import FEATURES

__all__ = ["Agent", "load_agent", "save_agent"]

KIND, VERSION = "ndp-gym layer agents", 3
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Agent:
    """A network from scaled features to actions.

    Attributes:
        features: (offset, scale) of its inputs, by name and in order.
        layers: weight [n_out, n_in] and bias [n_out] of every layer; tanh between them.
        base: constants of the planner whose decisions it bends, by name.
        forecast: weights [5, 6] of its forecast (`ndp_gym.layer_forecast.Learned`), ``None`` for
            the planner's own.
        card: what else is known about it: training, scores.

    Raises:
        ValueError: features or constants are unknown, or the layers do not fit together.
    """

    features: Mapping[str, tuple[float, float]]
    layers: Sequence[tuple[FloatArray, FloatArray]]
    base: Mapping[str, float] = field(default_factory=dict)
    forecast: NDArray[np.float64] | None = None
    card: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check names, shapes and numbers."""
        unknown = sorted(self.features.keys() - FEATURES.keys())
        if unknown:
            raise ValueError(f"layer agents have no features {unknown}; they have {list(FEATURES)}")
        base_constants(self.base)
        weights = self.forecast
        if weights is not None and not (weights.shape == (5, 6) and np.isfinite(weights).all()):
            raise ValueError(f"forecast must be 5 x 6 finite weights, got {weights.tolist()}")
        n_in = len(self.features)
        for i, (weight, bias) in enumerate(self.layers):
            if weight.ndim != 2 or weight.shape[1] != n_in or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"layer {i} must map {n_in} numbers, got weight {weight.shape}, bias "
                    f"{bias.shape}"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError(f"layer {i} must hold finite numbers")
            n_in = len(bias)
        if n_in != len(ACTIONS):
            raise ValueError(f"the last layer must give {len(ACTIONS)} numbers, got {n_in}")

    def __call__(self, features: FloatArray) -> FloatArray:
        """Actions [..., 4] in [-1, 1], without noise, for scaled features [..., F]."""
        values = features
        for weight, bias in self.layers[:-1]:
            values = np.tanh(values @ weight.T + bias)
        weight, bias = self.layers[-1]
        actions: FloatArray = np.clip(values @ weight.T + bias, -1, 1)
        return actions


def save_agent(agent: Agent, path: str | os.PathLike[str]) -> Path:
    """Write ``path`` (``.safetensors``) and the card beside it (``.json``); each appears whole.

    Returns:
        The path of the weights.
    """
    from safetensors.numpy import save

    weights, cards = _files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    card = {
        "kind": KIND,
        "version": VERSION,
        "features": {name: list(scaling) for name, scaling in agent.features.items()},
        "actions": list(ACTIONS),
        "base": dict(agent.base),
        "forecast": None if agent.forecast is None else agent.forecast.tolist(),
        "network": {"sizes": [len(bias) for _, bias in agent.layers], "activation": "tanh"},
        **agent.card,
    }
    arrays = {}
    for i, (weight, bias) in enumerate(agent.layers):
        arrays[f"{i}.weight"] = np.ascontiguousarray(weight, np.float32)
        arrays[f"{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    _write(cards, (json.dumps(card, indent=1) + "\n").encode())
    _write(weights, save(arrays))
    return weights


def load_agent(path: str | os.PathLike[str]) -> Agent:
    """The agent whose weights or card is at ``path``, with or without suffix.

    Raises:
        ValueError: a file is damaged or is of another kind; it is named.
        OSError: a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    weights, cards = _files(path)
    try:
        card = json.loads(cards.read_text(encoding="utf-8"))
        if (card["kind"], card["version"]) != (KIND, VERSION):
            raise ValueError(f"kind must be {KIND!r} version {VERSION}")
        if card["actions"] != list(ACTIONS) or card["network"]["activation"] != "tanh":
            raise ValueError(f"actions must be {list(ACTIONS)} behind a tanh network")
        arrays = load(weights.read_bytes())
        n_layers = len(card["network"]["sizes"])
        return Agent(
            features={name: (float(s[0]), float(s[1])) for name, s in card["features"].items()},
            layers=[(arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in range(n_layers)],
            base={name: float(value) for name, value in card["base"].items()},
            forecast=None if (w := card["forecast"]) is None else np.array(w, np.float64),
            card=card,
        )
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{weights}: not an agent: {error!r}") from error


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Weights and card of the agent that ``path`` names with or without a suffix."""
    stem = os.fspath(path).removesuffix(".safetensors").removesuffix(".json")
    return Path(stem + ".safetensors"), Path(stem + ".json")


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
