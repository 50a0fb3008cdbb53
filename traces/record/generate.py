"""One batch of requests: prefill, sampled decode through the KV cache, one row per token.

It hooks the routers and knows neither the model's library nor any file.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from traces.record.hooks import GateArray, IdArray, Routing, Rows, stack_rows, tap

TokenArray = npt.NDArray[np.int64]
_SORTED_FIRST = 4096  # tokens; nearly always enough of a large vocabulary for top_p


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; the defaults made the bundled recording.

    Attributes:
        n_tokens: Tokens to generate at most.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_p: Probability mass of the likeliest tokens that are drawn from.
        seed: Of the draws.
    """

    n_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.98
    seed: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        for name, ok, rule in (
            ("n_tokens", self.n_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


class RoutedModel(Protocol):
    """A model whose routers can be hooked; it keeps the KV cache of one batch."""

    @property
    def routers(self) -> Sequence[nn.Module]:
        """Router modules, first layer first."""

    @property
    def n_experts(self) -> int:
        """Experts per layer E."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Tokens that end an answer; they are not fed back and get no row."""

    def read(self, layer: int, output: Any) -> Routing:
        """Ids and weights ``[B * S, K]`` in what the router of a layer returned."""

    def prefill(self, prompts: Sequence[TokenArray]) -> Tensor:
        """Forget the last batch and run B prompts, padded on the left; logits ``[B, V]``."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the B sequences; logits ``[B, V]``."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One recorded request of S prompt rows and N decode rows.

    ``tokens`` [S + N], ``expert_ids`` and ``gate_weights`` [S + N, L, K].
    """

    tokens: TokenArray
    n_prompt: int
    expert_ids: IdArray
    gate_weights: GateArray


def sample(logits: Tensor, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token from ``logits`` [V] at the temperature, out of the likeliest ``top_p`` mass."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double().numpy() / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order, mass = _likeliest(p, sampling.top_p)
    n_kept = min(int(np.searchsorted(mass, sampling.top_p)) + 1, len(mass))
    u = rng.random() * mass[n_kept - 1]
    return int(order[min(int(np.searchsorted(mass, u, side="right")), n_kept - 1)])


def _likeliest(
    p: npt.NDArray[np.float64], top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens by falling probability until ``top_p`` is reached at least, and their running sum."""
    if len(p) > _SORTED_FIRST:
        few = np.flatnonzero(p > np.partition(p, -_SORTED_FIRST)[-_SORTED_FIRST])
        order = few[np.argsort(-p[few], kind="stable")]
        mass = np.cumsum(p[order])
        if len(mass) and mass[-1] >= top_p:
            return order, mass
    order = np.argsort(-p, kind="stable")
    return order, np.cumsum(p[order])


@torch.no_grad()
def answer(
    model: RoutedModel,
    prompts: Sequence[TokenArray],
    sampling: Sampling,
    rngs: Sequence[np.random.Generator],
    advance: Callable[[int], None] = lambda n_rows: None,
) -> list[Answer]:
    """Prefill the prompts in one pass, then sample tokens and feed each one back.

    The last sampled token is fed back too, so prompt and decode have one row per token. Sequence b
    draws from ``rngs[b]`` alone, so that what it says does not depend on the rest of the batch.

    Args:
        model: The model; its cache is used up.
        prompts: Tokens per sequence, at least one each.
        sampling: How tokens are drawn.
        rngs: One generator per sequence.
        advance: Called with the number of rows after every pass.

    Raises:
        ValueError: A router was not called, or returned something unknown.
    """
    said: list[list[int]] = [prompt.tolist() for prompt in prompts]
    live = list(range(len(prompts)))
    with tap(model.routers, model.read) as outputs:
        logits = model.prefill(prompts)
        parts = [[rows] for rows in _take(outputs, [len(p) for p in prompts], model)]
        advance(sum(len(p) for p in prompts))
        for _ in range(sampling.n_tokens):
            chosen = {b: sample(logits[b], sampling, rngs[b]) for b in live}
            live = [b for b in live if chosen[b] not in model.stop_ids]
            if not live:
                break
            filler = chosen[live[0]]
            logits = model.step([chosen.get(b, filler) for b in range(len(prompts))])
            rows = _take(outputs, [1] * len(prompts), model)
            for b in live:
                said[b].append(chosen[b])
                parts[b].append(rows[b])
            advance(len(live))
    return [
        Answer(
            tokens=np.array(tokens, dtype=np.int64),
            n_prompt=len(prompt),
            expert_ids=np.concatenate([rows.ids for rows in part]),
            gate_weights=np.concatenate([rows.gates for rows in part]),
        )
        for tokens, prompt, part in zip(said, prompts, parts, strict=True)
    ]


@torch.no_grad()
def route(model: RoutedModel, tokens: TokenArray) -> Rows:
    """Ids and weights ``[S, L, K]`` of ``tokens`` [S] in one teacher-forced pass."""
    with tap(model.routers, model.read) as outputs:
        model.prefill([tokens])
        return _take(outputs, [len(tokens)], model)[0]


def _take(outputs: list[Routing], n_tokens: Sequence[int], model: RoutedModel) -> list[Rows]:
    """The rows of the pass that just ended; empties ``outputs``."""
    if len(outputs) != len(model.routers):
        raise ValueError(
            f"each of the {len(model.routers)} routers must be called once per pass, "
            f"got {len(outputs)} calls: does a fused kernel stand in for them?"
        )
    rows = stack_rows(outputs, n_tokens, model.n_experts)
    outputs.clear()
    return rows
