"""Training of the small model: balanced routing from tiny batches, a schedule by step."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from traces.minimoe.model import Config, MiniMoE, RouterOutput, tap_routers
from traces.minimoe.prompts import Stream
from traces.minimoe.text import DOMAINS
from traces.minimoe.tokenizer import SEPARATOR


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of one training run; the defaults made the bundled weights.

    ``balance`` and ``z_loss`` are coefficients of losses averaged over layers. The last
    ``long_share`` of the steps sees sequences as long as prompt and answer of the recording.
    """

    n_steps: int = 1600
    batch_size: int = 8
    length: int = 256
    long_batch_size: int = 2
    long_length: int = 768
    long_share: float = 0.15
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    decay_share: float = 0.5
    final_rate: float = 0.02
    weight_decay: float = 0.1
    balance: float = 0.05
    z_loss: float = 1e-3
    mix: tuple[float, ...] = (0.30, 0.25, 0.15, 0.15, 0.15)
    packed_share: float = 0.5
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: warm-up, constant, linear to ``final_rate``."""
        left = (self.n_steps - step) / (self.decay_share * self.n_steps)
        factor = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * factor * max(self.final_rate, min(1.0, left))

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences and tokens per sequence of ``step``."""
        if step < (1 - self.long_share) * self.n_steps:
            return self.batch_size, self.length
        return self.long_batch_size, self.long_length


def draw_batch(
    streams: Mapping[str, Stream],
    recipe: Recipe,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> Tensor:
    """Tokens [B, S + 1] int64; some sequences continue in a second domain after a separator."""
    n_sequences, length = shape
    rows = np.empty((n_sequences, length + 1), dtype=np.int64)

    def cut(n: int) -> npt.NDArray[np.uint16]:
        stream = streams[DOMAINS[rng.choice(len(DOMAINS), p=recipe.mix)]]
        start = int(rng.integers(len(stream) - n))
        return stream[start : start + n]

    for row in rows:
        row[:] = cut(length + 1)
        if rng.random() < recipe.packed_share:
            at = int(rng.integers(1, length))
            row[at] = SEPARATOR
            row[at + 1 :] = cut(length - at)
    return torch.from_numpy(rows)


class Balance:
    """Load-balance loss over a running load, so that tiny batches balance globally."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        """Start from an even load."""
        self.load = torch.full((n_layers, n_experts), 1.0 / n_experts)

    def __call__(self, outputs: list[RouterOutput]) -> tuple[Tensor, Tensor]:
        """Mean over layers of E * sum(load * mean probability) and of logsumexp squared."""
        balance, z = [], []
        for layer, (logits, _, ids) in enumerate(outputs):
            n_experts = logits.shape[1]
            share = torch.bincount(ids.reshape(-1), minlength=n_experts) / ids.numel()
            self.load[layer].mul_(0.95).add_(share, alpha=0.05)
            mean = torch.softmax(logits, dim=-1).mean(0)
            balance.append(n_experts * (self.load[layer].clone() * mean).sum())
            z.append(torch.logsumexp(logits, dim=-1).square().mean())
        return torch.stack(balance).mean(), torch.stack(z).mean()


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    plain = [p for n, p in model.named_parameters() if "norm" in n or "router" in n]
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "router" not in n]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    streams: Mapping[str, Stream], config: Config, recipe: Recipe, report: Callable[[str], None]
) -> MiniMoE:
    """A model trained on ``streams``: the same arrays, CPU and torch give the same parameters.

    Args:
        streams: Training tokens per domain of ``DOMAINS``.
        config: Shape of the model.
        recipe: Numbers of the run.
        report: Called with a line of progress every 25 steps.

    Raises:
        ValueError: If the loss is not finite.
    """
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = MiniMoE(config)
    optimiser = _optimiser(model, recipe)
    balance = Balance(config.n_layers, config.n_experts)
    began, smooth = time.perf_counter(), math.log(config.vocabulary_size)
    for step in range(recipe.n_steps):
        tokens = draw_batch(streams, recipe, recipe.shape(step), rng)
        with tap_routers(model) as outputs:
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        aux, z = balance(outputs)
        _update(
            model, optimiser, loss + recipe.balance * aux + recipe.z_loss * z, recipe.rate(step)
        )
        if not math.isfinite(loss.item()):
            raise ValueError(f"training diverged at step {step}")
        smooth += 0.04 * (loss.item() - smooth)
        if (step + 1) % 25 == 0:
            report(
                f"step {step + 1}/{recipe.n_steps}  loss {smooth:.3f} nats/token  "
                f"balance {aux.item():.3f}  {time.perf_counter() - began:.0f} s"
            )
    return model.eval()


def _update(
    model: MiniMoE, optimiser: torch.optim.Optimizer, objective: Tensor, rate: float
) -> None:
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(objective)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()


@torch.no_grad()
def held_out_loss(model: MiniMoE, stream: Stream, length: int = 512, n_rows: int = 16) -> float:
    """Mean loss (nats per token) on the first ``n_rows`` spans of ``stream``."""
    n_rows = min(n_rows, (len(stream) - 1) // length)
    losses = []
    for row in range(n_rows):
        span = torch.from_numpy(stream[row * length : (row + 1) * length + 1].astype(np.int64))
        logits = model(span[None, :-1])[0]
        losses.append(functional.cross_entropy(logits, span[1:]).item())
    return float(np.mean(losses))
