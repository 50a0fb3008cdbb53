"""The weights file: a model in half precision with its vocabulary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from traces.minimoe.model import Config, MiniMoE
from traces.minimoe.tokenizer import Tokenizer

_MERGES = "vocabulary.merges"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained model with its vocabulary."""

    model: MiniMoE
    tokenizer: Tokenizer
    n_steps: int


def save(path: Path, weights: Weights) -> None:
    """Write ``weights`` as float16 safetensors; parameters outside its range are refused."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in weights.model.state_dict().items():
        tensors[name] = value.to(torch.float16)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"parameter {name!r} does not fit in half precision")
    merges = np.array(weights.tokenizer.merges, dtype=np.int16).reshape(-1, 2)
    tensors[_MERGES] = torch.from_numpy(merges)
    metadata = weights.model.config.metadata()
    metadata |= {"n_steps": str(weights.n_steps), "licence": "Apache-2.0"}
    save_file({k: t.contiguous() for k, t in sorted(tensors.items())}, str(path), metadata)


def load(path: Path) -> Weights:
    """Read a file of ``save``; the model computes in float32 on the stored half precision.

    Raises:
        ValueError: If a tensor or a metadata field is missing or has the wrong shape.
        OSError: If the file cannot be read.
    """
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _MERGES not in tensors:
        raise ValueError(f"{path.name} lacks the tensor {_MERGES!r}")
    tokenizer = Tokenizer((a, b) for a, b in tensors.pop(_MERGES).tolist())
    model = MiniMoE(Config.from_metadata(metadata))
    try:
        model.load_state_dict({k: t.to(torch.float32) for k, t in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not hold a MiniMoE: {error}") from error
    n_steps = int(metadata.get("n_steps", "0"))
    return Weights(model=model.eval(), tokenizer=tokenizer, n_steps=n_steps)
