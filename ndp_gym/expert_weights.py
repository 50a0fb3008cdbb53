"""Which tensors of a checkpoint are the matrices of which routed expert.

Names that are known (``N``, ``E``: numbers of layer and expert; anything may stand before
``layers``, and between layer and ``experts``):

- a tensor per matrix, ``layers.N.*.experts.E.w1 | w3 | w2.weight`` (Mixtral) or
  ``gate_proj | up_proj | down_proj.weight`` (Qwen, DeepSeek, OLMoE ...), [out, in];
- a tensor per layer, ``layers.N.*.experts.gate_up_proj | down_proj``, [E, out, in] (Transformers 5)
  or [E, in, out] (GPT-OSS, Llama 4), or ``layers.N.experts.w_in | w_out`` [E, in, out] (the bundled
  small model). Shapes tell the two orders apart. Gate and up are the first and the second half,
  or every other row where the tensor has a bias beside it (GPT-OSS).

Shared experts, ``mtp.*`` and layers beyond ``num_hidden_layers`` of ``config.json`` (DeepSeek's
extra prediction layer) are left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.checkpoint import Checkpoint, Tensor

__all__ = ["MATRICES", "ExpertWeights", "find_experts"]

MATRICES = ("gate", "up", "down")

_PREFIX = r"(?!mtp\.)(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts\."
_SINGLE = re.compile(_PREFIX + r"(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")
_FUSED = re.compile(_PREFIX + r"(?P<matrix>gate_up_proj|down_proj|w_in|w_out)(?:\.weight)?")
_NAMES = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_up_proj": "gate_up", "w_in": "gate_up", "w_out": "down",
}  # fmt: skip

Matrix = npt.NDArray[np.float32]


class ExpertWeights(NamedTuple):
    """Where the experts of a checkpoint lie.

    Attributes:
        layers: numbers of the routed layers in the checkpoint, ascending, [L].
        n_experts: E, the same in every layer.
        single: tensor by (layer, expert, matrix), of checkpoints with a tensor per matrix.
        fused: ``gate_up`` and ``down`` tensors by layer, of the others.
        interleaved: whether gate and up alternate in ``gate_up``.
    """

    layers: tuple[int, ...]
    n_experts: int
    single: Mapping[tuple[int, int, str], Tensor]
    fused: Mapping[int, tuple[Tensor, Tensor]]
    interleaved: bool

    def matrices(self, layer: int, expert: int) -> Iterator[tuple[str, Matrix]]:
        """Gate, up and down of one expert, [out, in] each, with the name of their tensor."""
        if self.single:
            for matrix in MATRICES:
                tensor = self.single[layer, expert, matrix]
                yield tensor.name, tensor.read()
            return
        gate_up, down = self.fused[layer]
        is_transposed = gate_up.shape[1] == down.shape[2]
        both = gate_up.read(expert)
        for half in _halves(both.T if is_transposed else both, interleaved=self.interleaved):
            yield f"{gate_up.name}[{expert}]", half
        del both, half  # one tensor in memory at a time
        last = down.read(expert)
        yield f"{down.name}[{expert}]", last.T if is_transposed else last

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of every matrix of every expert."""
        for tensor in self.single.values():
            yield tensor.shape[0], tensor.shape[1]
        for gate_up, down in self.fused.values():
            is_transposed = gate_up.shape[1] == down.shape[2]
            hidden, inner = down.shape[1:][::-1] if is_transposed else down.shape[1:]
            for _ in range(self.n_experts):
                yield from ((inner, hidden), (inner, hidden), (hidden, inner))


def find_experts(checkpoint: Checkpoint) -> ExpertWeights:
    """The routed experts of a checkpoint.

    Raises:
        ValueError: there are none, one is incomplete, or layers differ in their experts.
    """
    depth = _depth(checkpoint.config)
    single: dict[tuple[int, int, str], Tensor] = {}
    parts: dict[tuple[int, str], Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        found = _SINGLE.fullmatch(name) or _FUSED.fullmatch(name)
        matrix = _NAMES.get(found["matrix"]) if found else None
        if found is None or matrix is None or (depth is not None and int(found["layer"]) >= depth):
            continue
        layer = int(found["layer"])
        if expert := found.groupdict().get("expert"):
            _add(single, (layer, int(expert), matrix), tensor)
        else:
            _add(parts, (layer, matrix), tensor)
    if not single and not parts:
        raise ValueError(
            f"{_where(checkpoint)}: no experts among {len(checkpoint.tensors)} tensors; known "
            "are layers.N.*.experts.E.(w1|gate_proj ...).weight and layers.N.*.experts."
            f"(gate_up_proj|down_proj), the file has for example {_examples(checkpoint)}"
        )
    if single and parts:
        names = f"{next(iter(single.values())).name} and {next(iter(parts.values())).name}"
        raise ValueError(f"{_where(checkpoint)}: experts are stored in two ways: {names}")
    return _of_single(checkpoint, single) if single else _of_fused(checkpoint, parts)


def _depth(config: Mapping[str, Any]) -> int | None:
    """Layers of the model proper; in models of text and images those of the text part."""
    text = config.get("text_config")
    depth = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return depth if isinstance(depth, int) else None


def _of_single(
    checkpoint: Checkpoint, single: Mapping[tuple[int, int, str], Tensor]
) -> ExpertWeights:
    layers = sorted({layer for layer, _, _ in single})
    n_experts = 1 + max(expert for _, expert, _ in single)
    for layer in layers:
        for expert in range(n_experts):
            for matrix in MATRICES:
                if (layer, expert, matrix) not in single:
                    raise ValueError(
                        f"{_where(checkpoint)}: layer {layer} lacks the {matrix} matrix of expert "
                        f"{expert} (of {n_experts})"
                    )
    for tensor in single.values():
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{tensor.path}: {tensor.name} must be a matrix, got {list(tensor.shape)}"
            )
    return ExpertWeights(tuple(layers), n_experts, single, {}, False)


def _of_fused(checkpoint: Checkpoint, parts: Mapping[tuple[int, str], Tensor]) -> ExpertWeights:
    layers = sorted({layer for layer, _ in parts})
    fused = {}
    for layer in layers:
        gate_up, down = parts.get((layer, "gate_up")), parts.get((layer, "down"))
        if gate_up is None or down is None:
            lacking = "gate_up_proj" if gate_up is None else "down_proj"
            raise ValueError(f"{_where(checkpoint)}: layer {layer} lacks experts.{lacking}")
        fused[layer] = (gate_up, down)
        if not _fit(gate_up.shape, down.shape):
            raise ValueError(
                f"{gate_up.path}: {gate_up.name} {list(gate_up.shape)} and {down.name} "
                f"{list(down.shape)} must be [E, 2 I, H] and [E, H, I], or [E, H, 2 I] and "
                "[E, I, H]"
            )
    numbers = {pair[0].shape[0] for pair in fused.values()}
    if len(numbers) > 1:
        raise ValueError(f"{_where(checkpoint)}: layers differ in experts: {sorted(numbers)}")
    bias = f"{next(iter(fused.values()))[0].name}_bias"
    return ExpertWeights(tuple(layers), numbers.pop(), {}, fused, bias in checkpoint.tensors)


def _fit(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0] or 0 in gate_up:
        return False
    straight = gate_up[2] == down[1] and gate_up[1] == 2 * down[2]
    transposed = gate_up[1] == down[2] and gate_up[2] == 2 * down[1]
    return straight or transposed


def _halves(both: Matrix, *, interleaved: bool) -> tuple[Matrix, Matrix]:
    """Gate and up of [2 I, H]."""
    if interleaved:
        return both[0::2], both[1::2]
    inner = len(both) // 2
    return both[:inner], both[inner:]


def _add(tensors: dict[Any, Tensor], key: tuple[Any, ...], tensor: Tensor) -> None:
    if key in tensors:
        raise ValueError(
            f"{tensor.path}: {tensor.name} and {tensors[key].name} are the same expert"
        )
    tensors[key] = tensor


def _where(checkpoint: Checkpoint) -> str:
    return str(checkpoint.paths[0] if len(checkpoint.paths) == 1 else checkpoint.paths[0].parent)


def _examples(checkpoint: Checkpoint) -> str:
    """Two names that speak of experts, else the first two."""
    names = list(checkpoint.tensors)
    return ", ".join(([n for n in names if "expert" in n] or names)[:2]) or "no tensor at all"
