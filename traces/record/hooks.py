"""Forward hooks on router modules, and what they return as rows; knows no model by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ndp_gym.trace_content import id_dtype

IdArray = npt.NDArray[Any]  # uint8 or uint16
GateArray = npt.NDArray[np.float16]
T = TypeVar("T")


class Routing(NamedTuple):
    """Expert ids and weights ``[T, K]`` that one router chose for T tokens."""

    ids: Tensor
    gates: Tensor


class Rows(NamedTuple):
    """Ids and weights ``[n, L, K]`` of consecutive tokens of one sequence."""

    ids: IdArray
    gates: GateArray


@contextmanager
def tap(modules: Sequence[nn.Module], read: Callable[[int, Any], T]) -> Iterator[list[T]]:
    """Collect ``read(index, output)`` of every call of a module; the hooks go when the block ends.

    The list grows by one entry per module and forward pass; clear it between passes.
    """
    outputs: list[T] = []
    handles = [
        module.register_forward_hook(
            lambda _module, _arguments, output, index=index: outputs.append(read(index, output))
        )
        for index, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def find_routing(output: Any, top_k: int, n_experts: int, name: str) -> Routing | Tensor:
    """What a router returned: the ids and weights it chose, or its logits ``[T, E]`` alone.

    The ids are the integer tensor ``[T, K]``; the weights the floating-point one of that shape, or
    else the values at the ids of the one of shape ``[T, E]``. Position in the output is ignored.

    Args:
        output: A tensor, or a tuple of tensors and other things.
        top_k: Experts per token K.
        n_experts: Experts per layer E.
        name: What to call the router in a message.

    Raises:
        ValueError: Nothing, or more than one thing, has the right type and shape.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [t for t in parts if isinstance(t, Tensor) and t.ndim >= 2]
    real = [t.reshape(-1, t.shape[-1]) for t in tensors if t.is_floating_point()]
    whole = [
        t.reshape(-1, top_k)
        for t in tensors
        if t.shape[-1] == top_k and not (t.is_floating_point() or t.dtype == torch.bool)
    ]
    over_all = [t for t in real if t.shape[-1] == n_experts]
    if len(whole) == 1:
        gates = [t for t in real if t.shape == whole[0].shape]
        if len(gates) == 1:
            return Routing(whole[0], gates[0])
        if not gates and len(over_all) == 1:
            return Routing(whole[0], over_all[0].gather(1, whole[0].long()))
    elif not whole and len(over_all) == 1:
        return over_all[0]
    shapes = [f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in tensors]
    raise ValueError(
        f"{name} must return expert ids [tokens, {top_k}] with their weights, or logits "
        f"[tokens, {n_experts}], got {', '.join(shapes) or type(output).__name__}"
    )


def by_weight(routing: Routing) -> Routing:
    """The same choices with the largest weight first; equal weights keep their order."""
    gates, order = torch.sort(routing.gates, dim=-1, descending=True, stable=True)
    return Routing(routing.ids.gather(-1, order), gates)


def stack_rows(layers: Sequence[Routing], n_tokens: Sequence[int], n_experts: int) -> list[Rows]:
    """Rows per sequence of one pass over B sequences that are padded on the left.

    Args:
        layers: What each of the L routers chose for the B x S tokens, sequence by sequence.
        n_tokens: Real tokens per sequence ``[B]``: its last ones; those before are padding.
        n_experts: Experts per layer E.

    Raises:
        ValueError: A router gave too few or too many tokens.
    """
    device = layers[0].ids.device  # layers may lie on several
    ids = torch.stack([layer.ids.to(device) for layer in layers], dim=1)
    gates = torch.stack([layer.gates.to(device) for layer in layers], dim=1)
    n_sequences, (n_total, n_layers, top_k) = len(n_tokens), ids.shape
    if n_total % n_sequences or n_total // n_sequences != max(n_tokens):
        raise ValueError(
            f"routers must see {n_sequences} x {max(n_tokens)} tokens in a pass, got {n_total}"
        )
    shape = (n_sequences, -1, n_layers, top_k)
    id_rows = ids.cpu().numpy().astype(id_dtype(n_experts)).reshape(shape)
    gate_rows = gates.float().cpu().numpy().astype(np.float16).reshape(shape)
    return [
        Rows(id_rows[b, len(id_rows[b]) - n :], gate_rows[b, len(gate_rows[b]) - n :])
        for b, n in enumerate(n_tokens)
    ]
