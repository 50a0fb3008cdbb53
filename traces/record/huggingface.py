"""Hugging Face causal language models as ``RoutedModel``: routers found, read and run.

transformers is imported only here and only when a model is opened. Routers are found by their place
in the model, in the layout of transformers v5 (a module that returns logits, weights and ids) as in
that of v4 (often an ``nn.Linear``).
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from traces.record.generate import TokenArray
from traces.record.hooks import Routing, by_weight, find_routing
from traces.record.recompute import rule_of

_ROUTER_NAMES = ("gate", "router")
_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SELECTION_ORDER = ("phimoe",)  # the second choice may weigh more than the first
TESTED = {
    "mixtral": "softmax over all experts, renormalised to sum 1",
    "qwen2_moe": "softmax over all experts, renormalised where norm_topk_prob",
    "qwen3_moe": "softmax over all experts, renormalised where norm_topk_prob",
    "olmoe": "softmax over all experts, renormalised where norm_topk_prob",
    "deepseek_v2": "softmax over all experts, times routed_scaling_factor",
    "deepseek_v3": "sigmoid without the selection bias, renormalised where norm_topk_prob, "
    "times routed_scaling_factor",
    "gpt_oss": "softmax over the chosen experts",
    "phimoe": "sparsemixer: each choice among the experts near it; does not sum to 1",
    "granitemoe": "softmax over the chosen experts",
}
"""What gate weights are, by architecture; others may work but are not tested."""


class HuggingFaceModel:
    """A causal language model with routers, and the KV cache of the batch that runs.

    Attributes:
        model: The model, in evaluation mode.
        routers: Router modules, first layer first.
        layer_ids: The model's numbers of the routed layers.
        n_experts: Experts per layer E.
        top_k: Experts per token K.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, model: Any, *, stop_ids: Sequence[int] | None = None) -> None:
        """Find the routers of ``model`` (a transformers ``PreTrainedModel``).

        Args:
            model: The model; set to evaluation mode.
            stop_ids: Tokens that end an answer; default those of its generation config.

        Raises:
            ValueError: It has no mixture-of-experts layers, or its layers differ in E or K.
        """
        self.model = model.eval()
        self.config = model.config.get_text_config()
        found = find_routers(model)
        if not found:
            raise ValueError(
                f"{self.architecture} has no mixture-of-experts layers: no module called gate or "
                f"router chooses among experts"
            )
        self.layer_ids = tuple(_layer_id(name, i) for i, (name, _) in enumerate(found))
        self.routers = [module for _, module in found]
        self.n_experts, self.top_k = self._shape(found)
        self.stop_ids = frozenset(_stop_ids(model) if stop_ids is None else stop_ids)
        self._rule = rule_of(self.config)
        self._names = [name for name, _ in found]
        self._inputs = set(inspect.signature(model.forward).parameters)
        self._cache_name = (
            "cache" if "cache" in self._inputs else "past_key_values"
        )  # v5.24 renamed
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    @property
    def architecture(self) -> str:
        """The model type of its configuration."""
        return str(self.config.model_type)

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence that the configuration allows, where it says so."""
        n = getattr(self.config, "max_position_embeddings", None)
        return int(n) if isinstance(n, int) and n > 0 else None

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def expert_bytes(self) -> tuple[int, ...] | None:
        """Bytes of one routed expert per layer as loaded; None where they are not in one module."""
        modules = dict(self.model.named_modules())
        sizes = []
        for name in self._names:
            experts = modules.get(f"{name.rpartition('.')[0]}.experts")
            if experts is None:
                return None
            n_bytes = sum(p.numel() * p.element_size() for p in experts.parameters())
            sizes.append(n_bytes // self.n_experts)
        return tuple(sizes) if all(sizes) else None

    def read(self, layer: int, output: Any) -> Routing:
        """Ids and applied weights of what a router returned, the largest weight first.

        PhiMoE keeps the order in which its router chooses.

        Raises:
            ValueError: The output is of no known layout.
        """
        name = f"{self._names[layer]} ({type(self.routers[layer]).__name__})"
        found = find_routing(output, self.top_k, self.n_experts, name)
        if isinstance(found, Tensor):
            if self._rule is None:
                raise ValueError(
                    f"{name} returns logits alone, and how {self.architecture} chooses from them "
                    f"is not known here"
                )
            found = self._rule(found, self.top_k)
        return found if self.architecture in _SELECTION_ORDER else by_weight(found)

    def prefill(self, prompts: Sequence[TokenArray]) -> Tensor:
        """Run B prompts, padded on the left, from an empty cache; logits ``[B, V]`` in float32."""
        longest = max(len(prompt) for prompt in prompts)
        tokens = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for b, prompt in enumerate(prompts):
            tokens[b, longest - len(prompt) :] = prompt
            mask[b, longest - len(prompt) :] = 1
        self._cache = None
        self._mask = torch.from_numpy(mask).to(self._device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(torch.from_numpy(tokens), positions)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the B sequences; logits ``[B, V]`` in float32."""
        self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
        positions = self._mask.sum(-1, keepdim=True) - 1
        return self._forward(torch.tensor(tokens)[:, None], positions)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=tokens.to(self._device),
            attention_mask=self._mask,
            use_cache=True,
            **{self._cache_name: self._cache},
            **{name: value for name, value in optional.items() if name in self._inputs},
        )
        self._cache = output[self._cache_name]
        logits: Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _shape(self, found: Sequence[tuple[str, nn.Module]]) -> tuple[int, int]:
        shapes = {
            (_n_experts(module, self.config), getattr(module, "top_k", None) or self._config_top_k)
            for _, module in found
        }
        (n_experts, top_k), *others = shapes
        if others or n_experts is None or top_k is None:
            raise ValueError(
                f"{self.architecture}: all layers must have the same number of experts and the "
                f"same top_k, got {sorted(shapes, key=str)}"
            )
        return int(n_experts), int(top_k)

    @property
    def _config_top_k(self) -> int | None:
        return getattr(self.config, "num_experts_per_tok", None)


def find_routers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the routers in the order of the model's layers.

    A router is called ``gate`` or ``router`` and has ``top_k``, or is an ``nn.Linear`` beside
    experts (a dense layer's ``gate_proj`` and a shared expert's gate have other names).
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        beside_experts = hasattr(modules.get(parent), "experts")
        linear = isinstance(module, nn.Linear) and beside_experts
        if own in _ROUTER_NAMES and (hasattr(module, "top_k") or linear):
            found.append((name, module))
    return found


def _n_experts(module: nn.Module, config: Any) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    for owner in (module, config):
        for name in _N_EXPERTS:
            if isinstance(n := getattr(owner, name, None), int):
                return n
    return None


def _layer_id(name: str, index: int) -> int:
    """The number in ``model.layers.7.mlp.gate``; ``index`` where there is none."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else index


def _stop_ids(model: Any) -> list[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return []
    return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
