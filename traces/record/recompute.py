"""Expert choice from router logits, for layouts whose router module returns logits alone.

One rule per family, as the model's own block applies it (transformers 4.57, ``modeling_*.py``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from traces.record.hooks import Routing

Rule = Callable[[Tensor, int], Routing]


def softmax_then_top_k(logits: Tensor, top_k: int, *, renormalise: bool) -> Routing:
    """Weights are probabilities over all experts, divided by their sum where renormalised."""
    gates, ids = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
    if renormalise:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return Routing(ids, gates.to(logits.dtype))


def top_k_then_softmax(logits: Tensor, top_k: int) -> Routing:
    """Weights are probabilities over the chosen experts."""
    chosen, ids = torch.topk(logits, top_k, dim=-1)
    return Routing(ids, torch.softmax(chosen, dim=-1))


def sparsemixer(logits: Tensor, top_k: int, *, jitter: float) -> Routing:
    """Best expert, then the best of the rest, each weighted among those at most 2 jitters below.

    The weights are taken one by one and need neither fall nor sum to 1 (PhiMoE, arXiv 2409.12136).
    """
    ids, gates = [], []
    rest = logits
    for _ in range(top_k):
        best, index = rest.max(dim=-1, keepdim=True)
        far = (best - rest) / logits.abs().clamp(min=best) > 2 * jitter
        gates.append(torch.softmax(rest.masked_fill(far, -torch.inf), dim=-1).gather(-1, index))
        ids.append(index)
        rest = rest.scatter(-1, index, -torch.inf)
    return Routing(torch.cat(ids, dim=-1), torch.cat(gates, dim=-1))


def rule_of(config: Any) -> Rule | None:
    """How a model of this configuration chooses from logits; None where no rule is known."""
    family = config.model_type
    if family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        return partial(softmax_then_top_k, renormalise=config.norm_topk_prob)
    if family == "mixtral":
        return partial(softmax_then_top_k, renormalise=True)
    if family in ("granitemoe", "granitemoeshared", "granitemoehybrid", "gpt_oss"):
        return top_k_then_softmax
    if family == "phimoe":
        return partial(sparsemixer, jitter=config.router_jitter_noise)
    return None
