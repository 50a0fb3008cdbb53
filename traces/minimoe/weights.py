"""The weights file: a model in half precision with its vocabulary, as safetensors."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from traces.minimoe.model import Config, MiniMoE
from traces.minimoe.tokenizer import Tokenizer

_MERGES = "vocabulary.merges"
_METADATA = "minimoe"  # one key: the library does not keep the order of several


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained model with its vocabulary; ``made_with`` names the versions that trained it."""

    model: MiniMoE
    tokenizer: Tokenizer
    n_steps: int
    made_with: str


def versions() -> str:
    """Versions of the packages whose text and arithmetic matter."""
    torch_version = version("torch").split("+")[0]
    return f"Python {platform.python_version()}, numpy {version('numpy')}, torch {torch_version}"


def save(path: Path, weights: Weights) -> None:
    """Write ``weights`` as float16; the same weights always give the same bytes.

    Raises:
        ValueError: If a parameter is outside the range of half precision.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in weights.model.state_dict().items():
        tensors[name] = value.to(torch.float16).contiguous()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"parameter {name!r} does not fit in half precision")
    merges = np.array(weights.tokenizer.merges, dtype=np.int16).reshape(-1, 2)
    tensors[_MERGES] = torch.from_numpy(merges)
    facts = {
        "config": asdict(weights.model.config),
        "n_steps": weights.n_steps,
        "made_with": weights.made_with,
        "licence": "Apache-2.0",
    }
    save_file(tensors, str(path), {_METADATA: json.dumps(facts, sort_keys=True)})
    path.chmod(0o644)


def load(path: Path) -> Weights:
    """Read a file of ``save``; the model computes in float32 on the stored half precision.

    Raises:
        ValueError: If the metadata or a tensor is missing or does not fit.
        OSError: If the file cannot be read.
    """
    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if text is None or _MERGES not in tensors:
        raise ValueError(f"{path.name} must hold {_METADATA!r} metadata and {_MERGES!r}")
    facts = json.loads(text)
    tokenizer = Tokenizer((a, b) for a, b in tensors.pop(_MERGES).tolist())
    try:
        model = MiniMoE(Config(**facts["config"]))
        model.load_state_dict({k: t.to(torch.float32) for k, t in tensors.items()})
        n_steps, made_with = int(facts["n_steps"]), str(facts["made_with"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not hold a MiniMoE: {error}") from error
    return Weights(model=model.eval(), tokenizer=tokenizer, n_steps=n_steps, made_with=made_with)
