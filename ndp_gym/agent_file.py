"""Agents as files anyone may open: weights in safetensors, everything else in a JSON card.

Nothing is unpickled and no torch is needed: an agent is rebuilt from numbers and names that are
checked, and its network runs in numpy.
"""

from __future__ import annotations

import hashlib
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

KIND, VERSION = "ndp-gym layer agents", 4
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Agent:
    """A network from scaled features to actions.

    Attributes:
        features: (offset, scale) of its inputs, by name and in order; finite, and no scale is 0.
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
        for name, scaling in self.features.items():
            if not np.isfinite(scaling).all() or scaling[1] == 0:
                raise ValueError(
                    f"feature {name} must have a finite offset and scale, the scale not 0, got "
                    f"{list(scaling)}"
                )
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

    The card has the sha256 of the weights, so that no card is ever taken for that of others.

    Returns:
        The path of the weights.
    """
    from safetensors.numpy import save

    weights, cards = _files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for i, (weight, bias) in enumerate(agent.layers):
        arrays[f"{i}.weight"] = np.ascontiguousarray(weight, np.float32)
        arrays[f"{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    data = save(arrays)
    own = {
        "kind": KIND,
        "version": VERSION,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "features": {name: list(scaling) for name, scaling in agent.features.items()},
        "actions": list(ACTIONS),
        "base": dict(agent.base),
        "forecast": None if agent.forecast is None else agent.forecast.tolist(),
        "network": {"sizes": [len(bias) for _, bias in agent.layers], "activation": "tanh"},
    }
    card = own | dict(agent.card) | own  # first in order, and never those of another card
    _write(cards, (json.dumps(card, indent=1) + "\n").encode())
    _write(weights, data)
    return weights


def load_agent(path: str | os.PathLike[str]) -> Agent:
    """The agent whose weights or card is at ``path``, with or without suffix.

    Raises:
        ValueError: a file is damaged or is of another kind, or the two are not of one agent; file
            and fault are named.
        OSError: a file cannot be read.
    """
    weights, cards = _files(path)
    if Path(path).is_dir() and not cards.is_file():
        hint = f": {Path(path) / 'best'} is one" if (Path(path) / "best.json").is_file() else ""
        raise ValueError(f"{os.fspath(path)} is a folder, not an agent{hint}")
    text, data = cards.read_bytes(), weights.read_bytes()
    try:
        card = _card(text)
        if card["weights_sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError(
                f"its weights_sha256 is not that of {weights.name}: one of the two files is "
                f"damaged, or of another agent"
            )
        return Agent(
            features={name: _scaling(name, s) for name, s in card["features"].items()},
            layers=_layers(data, card["network"]["sizes"]),
            base={name: float(value) for name, value in card["base"].items()},
            forecast=None if (w := card["forecast"]) is None else np.array(w, np.float64),
            card=card,
        )
    except KeyError as error:
        raise ValueError(f"{cards}: not an agent: it has no {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{cards}: not an agent: {error}") from error


def _card(text: bytes) -> dict[str, Any]:
    """The card in a file, of this kind and version."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"must be a map, got a {type(card).__name__}")
    if (card["kind"], card["version"]) != (KIND, VERSION):
        raise ValueError(
            f"kind must be {KIND!r} version {VERSION}, got {card['kind']!r} version "
            f"{card['version']!r}"
        )
    if card["actions"] != list(ACTIONS) or card["network"]["activation"] != "tanh":
        raise ValueError(f"actions must be {list(ACTIONS)} behind a tanh network")
    return card


def _scaling(name: str, scaling: Any) -> tuple[float, float]:
    if not (isinstance(scaling, list) and len(scaling) == 2):
        raise ValueError(f"feature {name} must have an offset and a scale, got {scaling!r}")
    return float(scaling[0]), float(scaling[1])


def _layers(data: bytes, sizes: Sequence[int]) -> list[tuple[FloatArray, FloatArray]]:
    """Weight and bias of every layer in a file that holds layers of these sizes and no more."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"its weights are damaged: {error}") from error
    names = {f"{i}.{kind}" for i in range(len(sizes)) for kind in ("weight", "bias")}
    wrong = sorted(name for name, array in arrays.items() if array.dtype != np.float32)
    if arrays.keys() != names or wrong:
        raise ValueError(
            f"network of sizes {sizes} must have float32 arrays {sorted(names)}, got "
            f"{ {name: str(array.dtype) for name, array in sorted(arrays.items())} }"
        )
    layers = [(arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in range(len(sizes))]
    found = [bias.size for _, bias in layers]
    if found != sizes:
        raise ValueError(f"network sizes must be those of the weights, {found}, got {sizes}")
    return layers


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Weights and card of the agent that ``path`` names with or without a suffix."""
    stem = os.fspath(path).removesuffix(".safetensors").removesuffix(".json")
    return Path(stem + ".safetensors"), Path(stem + ".json")


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
