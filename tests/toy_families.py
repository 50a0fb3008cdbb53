"""Tiny random models of the families that the recorder knows, and their choices recomputed."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

Array = npt.NDArray[Any]
_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 63,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "intermediate_size": 16,
}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ONLY: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "qwen3_moe": {**_QWEN, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4},
    "deepseek_v2": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 16, "routed_scaling_factor": 2.5},
    "gpt_oss": {
        **_LOCAL,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phimoe": _LOCAL,
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 3},
}
FAMILIES = tuple(_ONLY)
DENSE_FIRST = ("qwen2_moe", "deepseek_v2", "deepseek_v3")


@cache
def family_model(family: str, seed: int = 0) -> Any:
    """A model with weights wide enough for clear choices; shared, so do not change it."""
    config = transformers.AutoConfig.for_model(family, **{**_SHAPE, **_ONLY[family]})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in name for part in ("gate.weight", "router.", "e_score")):
                parameter.normal_(0, 1)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def recomputed(family: str, router: Any, x: Array) -> tuple[Array, Array]:
    """Ids and weights ``[T, K]`` from the router's parameters and inputs ``x`` [T, H], in numpy.

    The rules stand in docs/traces.md; DeepSeek's rows are put in order of weight.
    """
    bias = router.bias if family == "gpt_oss" else None
    logits = x @ router.weight.detach().double().numpy().T
    logits = logits if bias is None else logits + bias.detach().double().numpy()
    k = router.top_k
    if family == "phimoe":
        return _sparsemixer(logits, 2 * router.router_jitter_noise)
    if family in ("gpt_oss", "granitemoe"):
        ids = np.argsort(-logits, axis=1)[:, :k]
        return ids, _softmax(np.take_along_axis(logits, ids, axis=1))
    if family == "deepseek_v3":
        scores = 1 / (1 + np.exp(-logits))
        biased = scores + router.e_score_correction_bias.double().numpy()
        best = np.sort(biased.reshape(-1, 4, 2), axis=2).sum(axis=2)
    else:
        scores = biased = _softmax(logits)
        best = scores.reshape(-1, 4, 2).max(axis=2)
    if family.startswith("deepseek"):
        allowed = np.argsort(-best, axis=1)[:, :2]  # topk_group of n_group groups of 2
        group = np.arange(8) // 2
        biased = np.where((group == allowed[:, :1]) | (group == allowed[:, 1:]), biased, -np.inf)
    ids = np.argsort(-biased, axis=1)[:, :k]
    gates = np.take_along_axis(scores, ids, axis=1)
    if family in ("mixtral", "qwen3_moe", "deepseek_v3"):
        gates = gates / gates.sum(axis=1, keepdims=True)
    gates = gates * getattr(router, "routed_scaling_factor", 1.0)
    order = np.argsort(-gates, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(gates, order, axis=1)


def _softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = p / p.sum(axis=1, keepdims=True)
    return result


def _sparsemixer(logits: Array, reach: float) -> tuple[Array, Array]:
    ids, gates = np.zeros((len(logits), 2), dtype=int), np.zeros((len(logits), 2))
    for t, row in enumerate(logits):
        left = row.copy()
        for rank in range(2):
            best = left.max()
            near = (best - left) / np.maximum(np.abs(row), best) <= reach
            ids[t, rank] = left.argmax()
            gates[t, rank] = 1 / np.exp(left[near] - best).sum()
            left[ids[t, rank]] = -np.inf
    return ids, gates
