"""Recording of the model's routing: real prefill, sampled decode, loops thrown away and redrawn.

It hooks the router modules, as one hooks Hugging Face models, and knows no file format.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ndp_gym.trace_loops import looped_rows
from traces.minimoe.model import MiniMoE, RouterOutput, tap_routers
from traces.minimoe.prompts import Prompt, PromptSource, Stream

_SPLIT_ORDER = ("test", "train", "test", "val")

Ids = npt.NDArray[np.uint8]
Gates = npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; the defaults made the bundled recording."""

    n_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.98
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One recorded request of S prompt rows and N decode rows.

    ``tokens`` [S + N], ``expert_ids`` [S + N, L, K] in descending order of weight and
    ``gate_weights`` [S + N, L, K] that sum to 1 (within half precision). ``n_looped`` answers were
    thrown away before this one.
    """

    prompt: Prompt
    tokens: npt.NDArray[np.int64]
    expert_ids: Ids
    gate_weights: Gates
    n_looped: int = 0

    @property
    def n_prompt(self) -> int:
        """Rows of prefill."""
        return len(self.prompt.tokens)


def stack_routing(outputs: list[RouterOutput]) -> tuple[Ids, Gates]:
    """Ids and renormalised weights [T, L, K] of one forward pass.

    The expert ids are recognised by type, not by position, so that other routers fit as well.

    Raises:
        ValueError: If a router did not return an integer tensor beside weights of its shape.
    """
    ids, gates = [], []
    for layer, output in enumerate(outputs):
        chosen = [t for t in output if not t.is_floating_point()]
        weights = [t for t in output if t.is_floating_point() and t.shape == chosen[0].shape]
        if len(chosen) != 1 or len(weights) != 1:
            raise ValueError(f"router of layer {layer} must return one id and one weight tensor")
        ids.append(chosen[0])
        gates.append(weights[0] / weights[0].sum(-1, keepdim=True))
    return (
        torch.stack(ids, dim=1).numpy().astype(np.uint8),
        torch.stack(gates, dim=1).numpy().astype(np.float16),
    )


def sample(logits: Tensor, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token from ``logits`` [V] at the temperature, out of the likeliest ``top_p`` mass."""
    scaled = logits.double().numpy() / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order])
    n_kept = int(np.searchsorted(mass, sampling.top_p)) + 1
    u = rng.random() * mass[n_kept - 1]
    return int(order[min(int(np.searchsorted(mass, u, side="right")), n_kept - 1)])


@torch.no_grad()
def record_request(
    model: MiniMoE, prompt: Prompt, sampling: Sampling, rng: np.random.Generator
) -> Request:
    """Prefill ``prompt`` in one pass, then sample tokens and feed each one back.

    The last sampled token is fed back too, so prompt and decode have one row per token.
    """
    tokens, cache = prompt.tokens.tolist(), model.new_cache()
    parts = []
    with tap_routers(model) as outputs:
        logits = model(torch.from_numpy(prompt.tokens)[None], cache)[0, -1]
        parts.append(stack_routing(outputs))
        for _ in range(sampling.n_tokens):
            tokens.append(sample(logits, sampling, rng))
            outputs.clear()
            logits = model(torch.tensor([tokens[-1:]]), cache)[0, -1]
            parts.append(stack_routing(outputs))
    return Request(
        prompt=prompt,
        tokens=np.array(tokens, dtype=np.int64),
        expert_ids=np.concatenate([ids for ids, _ in parts]),
        gate_weights=np.concatenate([gates for _, gates in parts]),
    )


@torch.no_grad()
def route(model: MiniMoE, tokens: npt.NDArray[np.int64]) -> tuple[Ids, Gates]:
    """Ids and weights [S, L, K] of ``tokens`` [S] in one teacher-forced pass."""
    with tap_routers(model) as outputs:
        model(torch.from_numpy(tokens)[None])
    return stack_routing(outputs)


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
            request = record_request(model, prompt, sampling, rng)
            if not looped_rows(request.expert_ids[request.n_prompt :]).any():
                yield replace(request, n_looped=n_looped)
                break
            report(f"request {i + 1} fell into a loop ({prompt.domain}), drawn again")
        if (i + 1) % 5 == 0:
            report(f"request {i + 1}/{n_requests}")


def assign_splits(requests: Sequence[Request], seed: int) -> list[str]:
    """Half test, a quarter train, a quarter val; even over domains and over kinds of prompt."""
    rng = np.random.default_rng(seed)
    shuffled = [requests[i] for i in rng.permutation(len(requests))]
    splits: dict[int, str] = {}
    for domain in {r.prompt.domain: None for r in requests}:
        members = [r for r in shuffled if r.prompt.domain == domain]
        members.sort(key=lambda r: r.prompt.opening is not None)
        splits |= {id(r): _SPLIT_ORDER[i % 4] for i, r in enumerate(members)}
    return [splits[id(r)] for r in requests]
