"""A model without a network for tests of the recorder: tokens and places decide everything."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from traces.record.generate import TokenArray
from traces.record.hooks import Routing

PAD_EXPERT = 0
VOCABULARY = 32


class ToyRouter(nn.Module):
    """Routes a token by its id, its position and the layer; padding goes to expert 0 alone."""

    def __init__(self, layer: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.layer, self.n_experts, self.top_k = layer, n_experts, top_k

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        first = (tokens * 7 + positions * (3 + self.layer) + self.layer) % (self.n_experts - 1)
        ranks = torch.arange(self.top_k)
        ids = 1 + (first[:, None] + ranks) % (self.n_experts - 1)
        ids[positions < 0] = PAD_EXPERT
        gates = torch.linspace(0.5, 0.1, self.top_k).expand(len(tokens), -1)
        return gates, ids


class ToyModel:
    """A ``RoutedModel``: the token after t is 3 t + 1 modulo 32."""

    def __init__(
        self, n_layers: int = 2, n_experts: int = 9, top_k: int = 3, stop_ids: Sequence[int] = ()
    ) -> None:
        self.routers = [ToyRouter(layer, n_experts, top_k) for layer in range(n_layers)]
        self.n_experts = n_experts
        self.stop_ids = stop_ids
        self.n_passes = 0
        self._lengths: list[int] = []

    def read(self, layer: int, output: Any) -> Routing:
        return Routing(output[1], output[0])

    def prefill(self, prompts: Sequence[TokenArray]) -> Tensor:
        self._lengths = [len(p) for p in prompts]
        longest = max(self._lengths)
        tokens = np.zeros((len(prompts), longest), dtype=np.int64)
        positions = np.tile(np.arange(longest), (len(prompts), 1))
        for b, prompt in enumerate(prompts):
            tokens[b, longest - len(prompt) :] = prompt
            positions[b] -= longest - len(prompt)
        return self._forward(torch.from_numpy(tokens), torch.from_numpy(positions))

    def step(self, tokens: Sequence[int]) -> Tensor:
        positions = torch.tensor(self._lengths)[:, None]
        self._lengths = [n + 1 for n in self._lengths]
        return self._forward(torch.tensor(tokens)[:, None], positions)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.n_passes += 1
        for router in self.routers:
            router(tokens.flatten(), positions.flatten())
        return nn.functional.one_hot((tokens[:, -1] * 3 + 1) % VOCABULARY, VOCABULARY).float()


def expected_ids(model: ToyModel, tokens: TokenArray) -> np.ndarray[Any, Any]:
    """Ids ``[S, L, K]`` of a whole sequence, from the rule of the routers."""
    places = torch.arange(len(tokens))
    layers = [router(torch.from_numpy(tokens), places)[1] for router in model.routers]
    return torch.stack(layers, dim=1).numpy()
