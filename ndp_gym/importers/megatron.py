"""Megatron-LM ``--moe-routing-trace-path``: JSONL, one line per step and layer.

A step is one forward pass over ``num_tokens`` tokens. Steps of one token continue the step before
them (generation at batch 1); every other step is a request of its own. Written by
``megatron/core/transformer/moe/router_trace.py``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source, integers, whole_number
from ndp_gym.importers.vllm import Ids
from ndp_gym.trace_file import parse_json

_MAX = 2**31


@dataclass(frozen=True)
class _Line:
    step: int
    layer: int
    rank: int
    ids: Ids  # [tokens, K]


def detects(source: Source) -> bool:
    """Whether the first line is an object with the format's keys."""
    head = source.data.lstrip()[:1]
    line = source.lines[0] if source.lines else b""
    return head == b"{" and all(re.search(rb'"%s"\s*:' % k, line) for k in (b"stage", b"topk"))


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The tokens of all files (one per rank), rank after rank, step after step."""
    if options.spans:
        raise sources[0].fail("a step is one request in this format, --spans is not accepted")
    table: dict[tuple[int, int], dict[int, Ids]] = {}
    dropped = 0
    for source in sources:
        for number, text in enumerate(source.lines, 1):
            name = f"{source.path}: line {number}"
            line = _line(text, name)
            if line is None:
                dropped += 1
                continue
            layers = table.setdefault((line.rank, line.step), {})
            if line.layer in layers:
                raise ValueError(f"{name} must not repeat step {line.step}, layer {line.layer}")
            layers[line.layer] = line.ids
    if not table:
        raise sources[0].fail("holds no line of block decoder and stage pre_dispatch")
    keys = sorted(table)
    layer_ids = sorted(table[keys[0]])
    steps = [_step(sources[0], key, table[key], layer_ids) for key in keys]
    if len({step.shape[2] for step in steps}) > 1:
        raise sources[0].fail("topk must be the same in all steps")
    warnings = []
    if dropped:
        warnings.append(f"{dropped} lines of other blocks or stages (mtp) are dropped")
    if any(len(step) > 1 for step in steps):
        warnings.append(
            "a step's tokens are taken as one sequence: with a micro-batch above 1 the sequences "
            "are interleaved in this format"
        )
    return Recording(
        expert_ids=np.concatenate(steps),
        segments=_segments(keys, [len(step) for step in steps]),
        model="unknown",
        id_order="router_rank",
        layer_ids=tuple(layer_ids),
        warnings=warnings,
    )


def _line(text: bytes, name: str) -> _Line | None:
    """One line, or None for another block or stage."""
    content: Any = parse_json(text, name)
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(content).__name__}")
    if content.get("stage") != "pre_dispatch" or content.get("block") != "decoder":
        return None
    numbers = {
        key: whole_number(content.get(key), 0, _MAX, f"{name}: {key}")
        for key in ("step", "layer", "rank", "num_tokens", "topk")
    }
    ids = integers(content.get("top_indices"), 2, f"{name}: top_indices")
    if ids.shape != (numbers["num_tokens"], numbers["topk"]):
        raise ValueError(
            f"{name}: top_indices must be [num_tokens={numbers['num_tokens']}, "
            f"topk={numbers['topk']}], got {list(ids.shape)}"
        )
    return _Line(numbers["step"], numbers["layer"], numbers["rank"], ids)


def _step(
    source: Source, key: tuple[int, int], layers: dict[int, Ids], layer_ids: list[int]
) -> Ids:
    """Ids ``[tokens, L, K]`` of one step."""
    where = f"rank {key[0]}, step {key[1]}"
    if sorted(layers) != layer_ids:
        raise source.fail(
            f"{where} must have the layers {layer_ids!s:.80}, got {sorted(layers)!s:.80}"
        )
    if len({ids.shape for ids in layers.values()}) > 1:
        raise source.fail(f"{where} must have the same tokens and topk in all layers")
    return np.stack([layers[layer] for layer in layer_ids], axis=1)


def _segments(keys: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[Segment]:
    """Requests: a step, and the steps of one token after it on the same rank."""
    segments: list[Segment] = []
    rank = -1
    for (step_rank, _), n_rows in zip(keys, lengths, strict=True):
        if n_rows == 1 and step_rank == rank:
            last = segments[-1]
            n_prompt = last.n_rows if last.n_prompt is None else last.n_prompt
            segments[-1] = Segment(
                n_rows=last.n_rows + 1, n_prompt=n_prompt, conversation=last.conversation
            )
        else:
            segments.append(Segment(n_rows=n_rows, conversation=len(segments)))
        rank = step_rank
    return segments
