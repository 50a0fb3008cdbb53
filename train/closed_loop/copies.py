"""The bundled model with each expert served at its own width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ndp_gym.quantizers import quantize
from traces.minimoe.experts import Experts
from traces.minimoe.model import Layer, MiniMoE

FULL = 16
WIDTHS = (FULL, 8, 4, 3, 2, 1)
BitMap = NDArray[np.uint8]
"""[L, E] width of every expert."""
Texts = Sequence[NDArray[np.int64]]
_BATCH_TOKENS = 4096  # padded tokens of one pass


class Copies:
    """A model and its experts at every width of `WIDTHS`; widths are made when first asked for.

    The model is changed in place by `serve`; 16 bit are the weights as they were given. Attention,
    routers, norms, embedding and head stay at 16 bit, as the quality model takes them.
    """

    def __init__(self, model: MiniMoE) -> None:
        """Remember the weights of ``model``, which must be at full width now."""
        self.model = model
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        self.shape = (model.config.n_layers, model.config.n_experts)
        self._made = {FULL: [_weights(layer.experts) for layer in self.layers]}
        self._served: BitMap = np.full(self.shape, FULL, np.uint8)

    def serve(self, bits: BitMap) -> None:
        """Put the copy of ``bits`` [L, E] in the place of every expert.

        Raises:
            ValueError: if the shape is another, or a width is not in `WIDTHS`.
        """
        if bits.shape != self.shape or not np.isin(bits, WIDTHS).all():
            raise ValueError(f"bits must be [L, E]={self.shape} of {WIDTHS}, got {bits.shape}")
        with torch.no_grad():
            for index, expert in np.argwhere(bits != self._served).tolist():
                w_in, w_out = self._copies(int(bits[index, expert]))[index]
                experts = self.layers[index].experts
                experts.w_in[expert] = w_in[expert]
                experts.w_out[expert] = w_out[expert]
        self._served = bits.astype(np.uint8)

    def add_noise(self, layer: int, size: float, seed: int) -> None:
        """Gaussian noise of relative squared size ``size`` on all experts of one layer.

        `serve` does not know of it: call `clean` before.
        """
        rng = torch.Generator().manual_seed(seed)
        experts = self.layers[layer].experts
        with torch.no_grad():
            for weight in (experts.w_in, experts.w_out):
                power = weight.square().mean(dim=(1, 2), keepdim=True)
                weight += torch.randn(weight.shape, generator=rng) * (size * power).sqrt()

    def clean(self) -> None:
        """Back to 16 bit everywhere, whatever was done to the weights."""
        with torch.no_grad():
            for layer, (w_in, w_out) in zip(self.layers, self._made[FULL], strict=True):
                layer.experts.w_in.copy_(w_in)
                layer.experts.w_out.copy_(w_out)
        self._served = np.full(self.shape, FULL, np.uint8)

    @cached_property
    def relative_error(self) -> NDArray[np.float64]:
        """[L, E, NB] ``||W^ - W||^2 / ||W||^2`` of all weights of an expert, as in `WIDTHS`."""
        result = np.zeros((*self.shape, len(WIDTHS)))
        for index, exact in enumerate(self._made[FULL]):
            total = sum(w.square().sum(dim=(1, 2)) for w in exact)
            for column, bits in enumerate(WIDTHS[1:], 1):
                pairs = zip(exact, self._copies(bits)[index], strict=True)
                lost = sum((copy - w).square().sum(dim=(1, 2)) for w, copy in pairs)
                result[index, :, column] = (lost / total).numpy()
        return result

    def _copies(self, bits: int) -> list[tuple[Tensor, Tensor]]:
        if bits not in self._made:
            self._made[bits] = [
                (_quantized(w_in, bits), _quantized(w_out, bits))
                for w_in, w_out in self._made[FULL]
            ]
        return self._made[bits]


def _weights(experts: Experts) -> tuple[Tensor, Tensor]:
    return experts.w_in.detach().clone(), experts.w_out.detach().clone()


def _quantized(weight: Tensor, bits: int) -> Tensor:
    """[E, in, out], each column of each expert in groups along its input."""
    n, n_in, n_out = weight.shape
    rows = weight.transpose(1, 2).reshape(n * n_out, n_in).numpy()
    copy = torch.from_numpy(quantize(rows, bits))
    return copy.view(n, n_out, n_in).transpose(1, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Summed next-token loss in nats and predicted tokens of every text, [D] each."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]


@torch.no_grad()
def loss(model: MiniMoE, texts: Texts) -> Loss:
    """Loss of ``model`` on texts [S] each; the first token of a text is given."""
    nats = np.empty(len(texts))
    order = np.argsort([len(t) for t in texts], kind="stable")
    for batch in _batches(texts, order):
        size = max(len(texts[i]) for i in batch)
        tokens = torch.zeros(len(batch), size, dtype=torch.int64)
        for row, i in enumerate(batch):
            tokens[row, : len(texts[i])] = torch.from_numpy(texts[i])
        logits = model(tokens)[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
        for row, i in enumerate(batch):
            nats[i] = each[row, : len(texts[i]) - 1].double().sum()
    return Loss(nats=nats, tokens=np.array([len(t) - 1 for t in texts]))


def _batches(texts: Texts, order: NDArray[np.int64]) -> list[list[int]]:
    """Texts of similar length together, so that little is padded."""
    batches: list[list[int]] = [[]]
    for i in order.tolist():
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[i]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
