"""The tokens behind a recording of the bundled model, read back from its routing.

The recording holds no text (only request 0 names its tokens), and the text it was made from differs
from one installation to the next. But layer 0 routes by the token and the tokens before it, so with
the weights at hand each row says which of the 1024 tokens it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ndp_gym.trace import RoutingTrace
from traces.minimoe.model import N_LEAKED_TOKENS, Layer, MiniMoE, rotate
from train.closed_loop.cache import Cache

N_NEAR = 24  # past tokens that a first look attends to
N_CLOSE = 48  # tokens that a first look leaves
GATE_TOLERANCE = 2e-3  # half precision of gates below 1, and other ways to round
LOGIT_TOLERANCE = 1e-4
Tokens = NDArray[np.int64]


class TokenReader:
    """Layer 0 of a model, asked which token makes it route as recorded."""

    def __init__(self, model: MiniMoE) -> None:
        """Prepare queries, keys and values [heads, V, D] of the vocabulary."""
        layer = model.layers[0]
        assert isinstance(layer, Layer)
        self._layer, self._x = layer, model.embedding.detach()
        attention = layer.attention
        with torch.no_grad():
            qkv = functional.linear(layer.attention_norm(self._x), attention.qkv)
            q, k, v = qkv.view(len(qkv), 3, attention.n_heads, -1).permute(1, 2, 0, 3)
            self._q = (attention.q_norm(q) / q.shape[-1] ** 0.5).contiguous()
            self._k, self._v = attention.k_norm(k).contiguous(), v.contiguous()
            self._own = (self._q * self._k).sum(-1, keepdim=True)

    @torch.no_grad()
    def read(self, expert_ids: NDArray[np.uint8], gates: NDArray[np.float16]) -> Tokens:
        """Tokens [S] of one request whose layer 0 was routed to ids [S, K] with gates [S, K].

        Raises:
            ValueError: no token routes as a row does.
        """
        ids = torch.from_numpy(expert_ids.astype(np.int64))
        wanted = torch.from_numpy(gates.astype(np.float32))
        past = [self._x.new_zeros(self._x.shape[1])] * N_LEAKED_TOKENS
        tokens = torch.empty(len(ids), dtype=torch.int64)
        for t in range(len(ids)):
            y = self._routed(slice(None), tokens[max(0, t - N_NEAR) : t])
            distance, _ = self._distance(y, past, ids[t], wanted[t])
            for candidates in (distance.topk(N_CLOSE, largest=False).indices, self._everyone()):
                y = self._routed(candidates, tokens[:t])
                distance, is_chosen = self._distance(y, past, ids[t], wanted[t])
                best = int(distance.argmin())
                if distance[best] < GATE_TOLERANCE and is_chosen[best]:
                    break
            else:
                raise ValueError(f"no token routes as row {t} does: {expert_ids[t].tolist()}")
            tokens[t] = candidates[best]
            past = [*past[1:], y[best]]
        return tokens.numpy()

    def _everyone(self) -> Tensor:
        return torch.arange(len(self._x))

    def _routed(self, candidates: Tensor | slice, before: Tensor) -> Tensor:
        """Router inputs [C, H] if each of the candidates followed the tokens ``before``."""
        keys = rotate(self._k[:, before], -len(before))
        scores = torch.cat((self._q[:, candidates] @ keys.mT, self._own[:, candidates]), dim=-1)
        weight = scores.softmax(-1)
        mixed = weight[..., :-1] @ self._v[:, before] + weight[..., -1:] * self._v[:, candidates]
        flat = mixed.transpose(0, 1).flatten(1)
        x = self._x[candidates] + functional.linear(flat, self._layer.attention.out)
        result: Tensor = self._layer.expert_norm(x)
        return result

    def _distance(
        self, y: Tensor, past: list[Tensor], ids: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[C] largest difference of a gate, and whether the experts ``ids`` are those chosen."""
        router = self._layer.router
        leaked = sum(router.leak**j * past[-j] for j in range(1, N_LEAKED_TOKENS + 1))
        logits = functional.linear(y + leaked, router.projection) * (1 - router.leak**2) ** 0.5
        chosen = logits[:, ids]
        n_above = (logits > chosen.amin(-1, keepdim=True) + LOGIT_TOLERANCE).sum(-1)
        return (chosen.softmax(-1) - wanted).abs().amax(-1), n_above < len(ids)


def read_tokens(
    trace: RoutingTrace,
    model: MiniMoE,
    requests: NDArray[np.int64],
    cache: Cache,
    report: Callable[[str], None],
    n_rows: int | None = None,
) -> dict[int, Tokens]:
    """Tokens of prompt and answer of every request in ``requests`` (indices), by index.

    ``n_rows`` stops after so many of each.

    Raises:
        ValueError: the recording has no gate weights, or is not of this model.
    """
    if trace.gate_weights is None:
        raise ValueError(f"{trace.name}: gate weights are needed to read tokens back")
    reader, found = TokenReader(model), {}
    for n, index in enumerate(requests.tolist()):
        if n % 10 == 0:
            report(f"tokens of request {n + 1}/{len(requests)}")
        length = min(int(trace.requests.length[index]), n_rows or trace.n_rows)
        ids, gates = trace.window(int(trace.requests.start[index]), length)
        assert gates is not None
        key = ("tokens", ids[:, 0], gates[:, 0])
        read = partial(reader.read, ids[:, 0], gates[:, 0])
        found[index] = cache.get(key, read).astype(np.int64)
    return found
