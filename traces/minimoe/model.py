"""The language model: attention and fine-grained mixture-of-experts layers with leaky routers."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from traces.minimoe.experts import Experts
from traces.record.hooks import tap

N_LEAKED_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of the model; the defaults are those of the bundled weights.

    ``leak_edge`` and ``leak_middle`` are the router's memory of the previous token in the first
    and last layer and in the middle one; a half sine lies between.
    """

    vocabulary_size: int = 1024
    hidden_size: int = 128
    n_layers: int = 8
    n_heads: int = 2
    n_experts: int = 64
    top_k: int = 6
    expert_size: int = 40
    leak_edge: float = 0.1
    leak_middle: float = 0.3

    def leak(self, layer: int) -> float:
        """Share alpha of the previous token in layer ``layer``'s routing logits."""
        phase = layer / max(1, self.n_layers - 1)
        return self.leak_edge + (self.leak_middle - self.leak_edge) * math.sin(math.pi * phase)


@dataclass
class LayerCache:
    """What decoding keeps of one layer: keys, values [B, heads, S, D] and the router's last rows.

    ``routed`` holds the last ``N_LEAKED_TOKENS`` router inputs [B, 3, H].
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    routed: Tensor | None = None


@dataclass
class Cache:
    """Decoding state of one batch of sequences."""

    layers: list[LayerCache]
    n_tokens: int = field(default=0)


class Router(nn.Module):
    """Leaky top-k router: the logits average over this and the three previous tokens.

    ``logits_t = sqrt(1 - a^2) * sum_j a^j W x_{t-j}``, j = 0..3. The leak ``a`` is chosen, not
    learned: it sets how many experts consecutive tokens share.
    """

    def __init__(self, config: Config, layer: int) -> None:
        """Draw the projection of layer ``layer``."""
        super().__init__()
        self.top_k = config.top_k
        self.leak = config.leak(layer)
        self.projection = nn.Parameter(torch.randn(config.n_experts, config.hidden_size) * 0.02)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route x [B, S, H], given the inputs ``past`` [B, 3, H] of the tokens before.

        Returns:
            Logits [T, E], weights [T, K] that sum to 1, and expert ids [T, K] in descending order
            of weight, T = B * S: the triple of Hugging Face's routers.
        """
        rows, n = torch.cat((past, x), dim=1), x.shape[1]
        scale = math.sqrt(1 - self.leak**2)
        mixed = x * scale
        for j in range(1, N_LEAKED_TOKENS + 1):
            start = N_LEAKED_TOKENS - j
            mixed = mixed + rows[:, start : start + n] * (scale * self.leak**j)
        logits = functional.linear(mixed, self.projection).flatten(0, 1)
        top, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(top, dim=-1), ids


class Attention(nn.Module):
    """Causal attention with normalised queries and keys and rotary positions (base 10^4)."""

    def __init__(self, config: Config) -> None:
        """Draw the projections."""
        super().__init__()
        h = config.hidden_size
        self.n_heads = config.n_heads
        self.qkv = nn.Parameter(torch.randn(3 * h, h) / math.sqrt(h))
        self.out = nn.Parameter(torch.randn(h, h) * output_scale(config) / math.sqrt(h))
        dim = h // config.n_heads
        self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, cache: LayerCache | None, start: int) -> Tensor:
        """Attend from x [B, S, H] at positions start..; a cached past needs S = 1."""
        b, s, h = x.shape
        qkv = functional.linear(x, self.qkv).view(b, s, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q = rotate(self.q_norm(qkv[0]), start)
        k, v = rotate(self.k_norm(qkv[1]), start), qkv[2]
        if cache is not None:
            if cache.keys is not None and cache.values is not None:
                k, v = torch.cat((cache.keys, k), dim=2), torch.cat((cache.values, v), dim=2)
            cache.keys, cache.values = k, v
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=k.shape[2] == s)
        return functional.linear(y.transpose(1, 2).reshape(b, s, h), self.out)


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary position embedding of x [..., S, D] at positions start..start+S-1."""
    s, half = x.shape[-2], x.shape[-1] // 2
    frequency = 1e4 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(start, start + s, dtype=torch.float32)[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def output_scale(config: Config) -> float:
    """Initial scale of projections into the residual stream (two per layer)."""
    return 1 / math.sqrt(2 * config.n_layers)


class Layer(nn.Module):
    """Attention, then routed experts; pre-norm, no shared expert."""

    def __init__(self, config: Config, index: int) -> None:
        """Draw layer ``index`` of 0..n_layers-1."""
        super().__init__()
        h = config.hidden_size
        self.attention_norm, self.expert_norm = nn.RMSNorm(h, eps=1e-6), nn.RMSNorm(h, eps=1e-6)
        self.attention = Attention(config)
        self.router = Router(config, index)
        self.experts = Experts(h, config.expert_size, config.n_experts, output_scale(config))

    def forward(self, x: Tensor, cache: LayerCache | None, start: int) -> Tensor:
        """Map the residual stream x [B, S, H] at positions start..; fills the cache if given."""
        x = x + self.attention(self.attention_norm(x), cache, start)
        y = self.expert_norm(x)
        past = y.new_zeros(y.shape[0], N_LEAKED_TOKENS, y.shape[2])
        if cache is not None:
            past = past if cache.routed is None else cache.routed
            cache.routed = torch.cat((past, y), dim=1)[:, -N_LEAKED_TOKENS:]
        _, weights, ids = self.router(y, past)
        mixed: Tensor = self.experts(y.flatten(0, 1), weights, ids)
        return x + mixed.view_as(x)


class MiniMoE(nn.Module):
    """Token ids [B, S] to next-token logits [B, S, V]."""

    def __init__(self, config: Config) -> None:
        """Draw all parameters from torch's global generator.

        Raises:
            ValueError: If the heads do not divide the width or ``top_k`` is out of range.
        """
        super().__init__()
        if config.hidden_size % (2 * config.n_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * n_heads={2 * config.n_heads}, "
                f"got {config.hidden_size}"
            )
        if not 1 <= config.top_k <= config.n_experts:
            raise ValueError(
                f"top_k must be in 1..n_experts={config.n_experts}, got {config.top_k}"
            )
        self.config = config
        v, h = config.vocabulary_size, config.hidden_size
        self.embedding = nn.Parameter(torch.randn(v, h) * 0.5)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(h, eps=1e-6)
        self.head = nn.Parameter(torch.randn(v, h) * 0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Next-token logits [B, S, V] of tokens [B, S]; a filled cache takes S = 1 only."""
        start = 0 if cache is None else cache.n_tokens
        if start and tokens.shape[1] != 1:
            raise ValueError(f"a filled cache takes one token at a time, got {tokens.shape[1]}")
        x = functional.embedding(tokens, self.embedding)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if cache is None else cache.layers[i], start)
        if cache is not None:
            cache.n_tokens += tokens.shape[1]
        return functional.linear(self.norm(x), self.head)

    def new_cache(self) -> Cache:
        """An empty decoding state."""
        return Cache(layers=[LayerCache() for _ in self.layers])

    def routers(self) -> list[Router]:
        """The router modules, first layer first."""
        return [m for m in self.modules() if isinstance(m, Router)]


RouterOutput = tuple[Tensor, Tensor, Tensor]


def tap_routers(model: MiniMoE) -> AbstractContextManager[list[RouterOutput]]:
    """Collect what the router modules return: one (logits, weights, ids) per layer and pass.

    The list grows by ``n_layers`` entries per forward pass; clear it between passes.
    """
    return tap(model.routers(), lambda _layer, output: output)
