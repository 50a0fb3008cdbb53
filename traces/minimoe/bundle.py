"""Recorded requests as one routing trace file with its provenance."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import SPLITS, Requests
from traces.minimoe.prompts import Prompt
from traces.minimoe.record import Request, assign_splits
from traces.minimoe.weights import Weights, versions
from traces.record.generate import Sampling
from traces.record.writer import Parts

LICENCE = "Apache-2.0"
PRESET = "minimoe-16b"
LOCALITY_NOTE = (
    "Step-to-step reuse is set by the leaky router (metadata extra.router_leak), which was chosen "
    "to match recordings of real models; it is no evidence for the locality of real models."
)


def make_trace(
    requests: Iterable[Request],
    source: Weights,
    sampling: Sampling,
    weights_file: Path,
    parts_folder: Path,
) -> RoutingTrace:
    """The trace of ``requests``: one conversation each, split half test, quarter train and val.

    The rows go to ``parts_folder`` as they come and stay there until the trace is saved. The
    tokens of request 0 go into the metadata, so that anyone can recompute its routing.
    """
    config = source.model.config
    prompts, lengths, n_looped, first_tokens = [], [], 0, None
    with Parts(parts_folder, (config.n_layers, config.top_k), config.n_experts, {}) as parts:
        for request in requests:
            parts.append(request.answer.expert_ids, request.answer.gate_weights, {})
            prompts.append(request.prompt)
            lengths.append(len(request.answer.tokens))
            n_looped += request.n_looped
            first_tokens = request.answer.tokens.tolist() if first_tokens is None else first_tokens
    metadata = TraceMetadata(
        model="minimoe",
        n_experts=config.n_experts,
        top_k=config.top_k,
        preset=PRESET,
        source=f"traces/minimoe: a model trained on text of {source.made_with}",
        licence=LICENCE,
        recorder="python -m traces.minimoe",
        id_order="router_rank",
        source_sha256={weights_file.name: hashlib.sha256(weights_file.read_bytes()).hexdigest()},
        extra={
            "locality": LOCALITY_NOTE,
            "router_leak": [round(config.leak(i), 4) for i in range(config.n_layers)],
            "recorded_with": versions(),
            "sampling": asdict(sampling),
            "n_looped": n_looped,
            "opening_domain": [p.opening for p in prompts],
            "tokens_of_request_0": first_tokens,
        },
    )
    return parts.trace(_table(prompts, lengths, sampling.seed), metadata)


def _table(prompts: Sequence[Prompt], lengths: Sequence[int], seed: int) -> Requests:
    domains = tuple(dict.fromkeys(p.domain for p in prompts))
    length = np.array(lengths, dtype=np.int64)
    return Requests(
        start=np.cumsum(length) - length,
        n_prompt=np.array([len(p.tokens) for p in prompts], dtype=np.int64),
        length=length,
        context_offset=np.zeros_like(length),
        conversation=np.arange(len(prompts), dtype=np.int64),
        domain=np.array([domains.index(p.domain) for p in prompts], dtype=np.int64),
        split=np.array([SPLITS.index(s) for s in assign_splits(prompts, seed)], dtype=np.int64),
        domains=domains,
    )
