"""The routed experts of one layer, evaluated group by group; knows nothing of the router."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of rows sorted by expert; the gate multiplies the hidden units (the narrow side).

    A Python loop of plain matrix products: on one CPU core it beats padding and batching.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor, sizes: list[int]
    ) -> Tensor:
        hidden = x.new_empty(len(x), w_in.shape[2])
        y = x.new_empty(len(x), w_out.shape[2])
        for e, rows in _groups(sizes):
            torch.mm(x[rows], w_in[e], out=hidden[rows])
        a, b = hidden.chunk(2, dim=1)
        act = nn.functional.silu(a) * b
        gated = act * gate[:, None]
        for e, rows in _groups(sizes):
            torch.mm(gated[rows], w_out[e], out=y[rows])
        ctx.save_for_backward(x, gate, w_in, w_out, hidden, act, gated)
        ctx.sizes = sizes
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, w_in, w_out, hidden, act, gated = ctx.saved_tensors
        dy = grads[0].contiguous()
        d_gated = torch.empty_like(gated)
        dw_out, dw_in = torch.zeros_like(w_out), torch.zeros_like(w_in)
        for e, rows in _groups(ctx.sizes):
            torch.mm(dy[rows], w_out[e].T, out=d_gated[rows])
            torch.mm(gated[rows].T, dy[rows], out=dw_out[e])
        d_gate = (d_gated * act).sum(1)
        d_act = d_gated * gate[:, None]
        a, b = hidden.chunk(2, dim=1)
        s = torch.sigmoid(a)
        silu = a * s
        d_hidden = torch.cat((d_act * b * (s + silu * (1 - s)), d_act * silu), dim=1)
        dx = torch.empty_like(x)
        for e, rows in _groups(ctx.sizes):
            torch.mm(d_hidden[rows], w_in[e].T, out=dx[rows])
            torch.mm(x[rows].T, d_hidden[rows], out=dw_in[e])
        return dx, d_gate, dw_in, dw_out, None


def _groups(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, size in enumerate(sizes):
        if size:
            yield e, slice(start, start + size)
            start += size


class Experts(nn.Module):
    """``n_experts`` SwiGLU experts of inner width ``expert_size``, no biases."""

    def __init__(
        self, hidden_size: int, expert_size: int, n_experts: int, output_scale: float
    ) -> None:
        """Draw weights; ``output_scale`` multiplies the standard deviation of the output."""
        super().__init__()
        std_in, std_out = 1 / math.sqrt(hidden_size), output_scale / math.sqrt(expert_size)
        self.w_in = nn.Parameter(torch.randn(n_experts, hidden_size, 2 * expert_size) * std_in)
        self.w_out = nn.Parameter(torch.randn(n_experts, expert_size, hidden_size) * std_out)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Weighted sum of each token's experts; x [T, H], weights and ids [T, K] -> [T, H]."""
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        token = order // ids.shape[1]
        sizes = torch.bincount(flat, minlength=len(self.w_in)).tolist()
        rows = x.index_select(0, token)
        gate = weights.reshape(-1).index_select(0, order)
        y = _GroupedSwiGLU.apply(rows, gate, self.w_in, self.w_out, sizes)  # type: ignore[no-untyped-call]
        return torch.zeros_like(x).index_add(0, token, y)
