"""Decoding in batch slots of unequal context: one token of every live request per step."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ndp_gym.trace import RoutingTrace
from traces.minimoe.model import N_LEAKED_TOKENS, Attention, Layer, MiniMoE, rotate
from traces.minimoe.prompts import PromptSource
from traces.record.generate import Sampling
from train.closed_loop.few_tokens import mix


class Step(NamedTuple):
    """What a step of n live slots gives: logits [n, V], ids [n, L, K], gates [n, L, K]."""

    logits: Tensor
    expert_ids: NDArray[np.uint8]
    gates: NDArray[np.float16]


class Decoder:
    """Keys, values and router memory of B slots; the model's weights may change between steps."""

    def __init__(self, model: MiniMoE, n_slots: int, n_positions: int) -> None:
        """Empty slots of up to ``n_positions`` tokens."""
        config = model.config
        self.model = model
        self._layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        dim = config.hidden_size // config.n_heads
        cache = (config.n_layers, n_slots, config.n_heads, n_positions, dim)
        self._keys, self._values = torch.zeros(cache), torch.zeros(cache)
        self._past = torch.zeros(config.n_layers, n_slots, N_LEAKED_TOKENS, config.hidden_size)
        self.length = torch.zeros(n_slots, dtype=torch.int64)
        ones, zeros = torch.ones(n_positions, dim // 2), torch.zeros(n_positions, dim // 2)
        self._cos, self._sin = rotate(torch.cat((ones, zeros), dim=-1), 0).chunk(2, dim=-1)

    @torch.no_grad()
    def prefill(self, slot: int, prompt: NDArray[np.int64]) -> Tensor:
        """Run ``prompt`` [S] into a slot -> logits [V] after its last token."""
        cache = self.model.new_cache()
        logits: Tensor = self.model(torch.from_numpy(prompt)[None], cache)[0, -1]
        for i, layer in enumerate(cache.layers):
            assert layer.keys is not None
            assert layer.values is not None
            assert layer.routed is not None
            self._keys[i, slot, :, : len(prompt)] = layer.keys[0]
            self._values[i, slot, :, : len(prompt)] = layer.values[0]
            self._past[i, slot] = layer.routed[0]
        self.length[slot] = len(prompt)
        return logits

    @torch.no_grad()
    def step(self, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> Step:
        """Feed one token to each of the n distinct ``slots``."""
        chosen = torch.from_numpy(slots)
        x = functional.embedding(torch.from_numpy(tokens), self.model.embedding)
        ids, gates = [], []
        for i, layer in enumerate(self._layers):
            x = x + self._attend(i, layer.attention, layer.attention_norm(x), chosen)
            y = layer.expert_norm(x)
            past = self._past[i, chosen]
            _, weights, experts = layer.router(y[:, None], past)
            self._past[i, chosen] = torch.cat((past[:, 1:], y[:, None]), dim=1)
            x = x + mix(layer.experts, y, weights, experts)
            ids.append(experts)
            gates.append(weights)
        self.length[chosen] += 1
        return Step(
            functional.linear(self.model.norm(x), self.model.head),
            torch.stack(ids, dim=1).numpy().astype(np.uint8),
            torch.stack(gates, dim=1).numpy().astype(np.float16),
        )

    def _attend(self, i: int, attention: Attention, x: Tensor, slots: Tensor) -> Tensor:
        """Attention of x [n, H] in layer ``i``, one new token per slot."""
        place = self.length[slots]
        qkv = functional.linear(x, attention.qkv).view(len(x), 3, attention.n_heads, -1)
        self._keys[i, slots, :, place] = self._turn(attention.k_norm(qkv[:, 1]), place)
        self._values[i, slots, :, place] = qkv[:, 2]
        q = x.new_zeros(len(self.length), *qkv.shape[2:])
        q[slots] = self._turn(attention.q_norm(qkv[:, 0]), place) / math.sqrt(qkv.shape[-1])
        seen = int(place.max()) + 1
        unseen = torch.arange(seen) > self.length[:, None]
        scores = (self._keys[i, :, :, :seen] @ q[..., None])[..., 0]
        weight = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
        mixed = (weight[:, :, None] @ self._values[i, :, :, :seen])[slots]
        return functional.linear(mixed.flatten(1), attention.out)

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotary embedding of x [n, heads, D] at one position per row."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self._cos[place, None], self._sin[place, None]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def sampling_noise(trace: RoutingTrace) -> list[np.random.Generator]:
    """A generator per request that draws what its recorded answer was sampled with.

    The recorder drew prompts and answers from one generator, so lengths are enough to follow it:
    an answer that looped was drawn again with another prompt.
    """
    sampling = Sampling(**trace.metadata.extra["sampling"])
    endless = {d: np.zeros(1 << 24, np.uint16) for d in trace.requests.domains}
    rng = np.random.default_rng(sampling.seed)
    source = PromptSource(endless, rng)
    noise = []
    for i, n_prompt in enumerate(trace.requests.n_prompt.tolist()):
        turn, d = divmod(i, len(source.domains))
        while True:
            prompt = source.draw(source.domains[d], mixed=turn % 2 == 1)
            state = rng.bit_generator.state
            rng.random(sampling.n_tokens)
            if len(prompt.tokens) == n_prompt:
                break
        noise.append(np.random.default_rng())
        noise[-1].bit_generator.state = state
    return noise
