"""Recording of the small model: prompts drawn, loops thrown away and redrawn, splits dealt out.

The requests themselves are recorded by ``traces.record``, as those of any other model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ndp_gym.trace_loops import looped_rows
from traces.minimoe.model import Cache, MiniMoE, Router
from traces.minimoe.prompts import Prompt, PromptSource, Stream
from traces.record import generate
from traces.record.generate import Answer, Sampling, TokenArray
from traces.record.hooks import Routing, Rows, find_routing

_SPLIT_ORDER = ("test", "train", "test", "val")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A recorded request; ``n_looped`` answers were thrown away before this one."""

    prompt: Prompt
    answer: Answer
    n_looped: int = 0


class RecordableMiniMoE:
    """The model as ``traces.record.generate.RoutedModel``, one sequence at a time."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, model: MiniMoE) -> None:
        """Wrap ``model``, with an empty cache."""
        self._model = model
        self._cache: Cache = model.new_cache()
        self.routers: list[Router] = model.routers()
        self.n_experts = model.config.n_experts

    def read(self, layer: int, output: Any) -> Routing:
        """Ids and weights of one router, the weights renormalised to sum to 1."""
        config = self._model.config
        found = find_routing(output, config.top_k, config.n_experts, f"router of layer {layer}")
        if isinstance(found, Tensor):
            raise ValueError(f"router of layer {layer} must return ids and weights, got logits")
        return Routing(found.ids, found.gates / found.gates.sum(-1, keepdim=True))

    def prefill(self, prompts: Sequence[TokenArray]) -> Tensor:
        """Run one prompt from an empty cache; logits ``[1, V]``."""
        if len(prompts) != 1:
            raise ValueError(f"MiniMoE answers one prompt at a time, got {len(prompts)}")
        self._cache = self._model.new_cache()
        return self._forward(torch.from_numpy(prompts[0])[None])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token; logits ``[1, V]``."""
        return self._forward(torch.tensor(tokens)[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(tokens, self._cache)
        return logits[:, -1]


def record_request(
    model: MiniMoE, prompt: Prompt, sampling: Sampling, rng: np.random.Generator
) -> Answer:
    """Prefill ``prompt`` in one pass, then sample tokens and feed each one back."""
    return generate.answer(RecordableMiniMoE(model), [prompt.tokens], sampling, [rng])[0]


def route(model: MiniMoE, tokens: npt.NDArray[np.int64]) -> Rows:
    """Ids and weights [S, L, K] of ``tokens`` [S] in one teacher-forced pass."""
    return generate.route(RecordableMiniMoE(model), tokens)


def record(
    model: MiniMoE,
    held_out: Mapping[str, Stream],
    n_requests: int,
    sampling: Sampling,
    report: Callable[[str], None],
) -> Iterator[Request]:
    """Record ``n_requests`` requests, domains round robin, every second round mixed prompts.

    A request whose answer loops is drawn again with the next prompt of the same kind.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(sampling.seed)
    source = PromptSource(held_out, rng)
    for i in range(n_requests):
        turn, d = divmod(i, len(source.domains))
        for n_looped in count():
            prompt = source.draw(source.domains[d], mixed=turn % 2 == 1)
            answer = record_request(model, prompt, sampling, rng)
            if not looped_rows(answer.expert_ids[answer.n_prompt :]).any():
                yield Request(prompt=prompt, answer=answer, n_looped=n_looped)
                break
            report(f"request {i + 1} fell into a loop ({prompt.domain}), drawn again")
        if (i + 1) % 5 == 0:
            report(f"request {i + 1}/{n_requests}")


def assign_splits(prompts: Sequence[Prompt], seed: int) -> list[str]:
    """Half test, a quarter train, a quarter val; even over domains and over kinds of prompt."""
    rng = np.random.default_rng(seed)
    shuffled = [prompts[i] for i in rng.permutation(len(prompts))]
    splits: dict[int, str] = {}
    for domain in {p.domain: None for p in prompts}:
        members = [p for p in shuffled if p.domain == domain]
        members.sort(key=lambda p: p.opening is not None)
        splits |= {id(p): _SPLIT_ORDER[i % 4] for i, p in enumerate(members)}
    return [splits[id(p)] for p in prompts]
