"""Recorded requests as one routing trace file with its provenance."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import SPLITS, Requests
from traces.minimoe.record import Request, Sampling, assign_splits
from traces.minimoe.weights import Weights, versions

LICENCE = "Apache-2.0"
PRESET = "minimoe-16b"
LOCALITY_NOTE = (
    "Step-to-step reuse is set by the leaky router (metadata extra.router_leak), which was chosen "
    "to match recordings of real models; it is no evidence for the locality of real models."
)


def make_trace(
    requests: Sequence[Request], source: Weights, sampling: Sampling, weights_file: Path
) -> RoutingTrace:
    """The trace of ``requests``: one conversation each, split half test, quarter train and val.

    The tokens of request 0 go into the metadata, so that anyone can recompute its routing.
    """
    config = source.model.config
    domains = tuple(dict.fromkeys(r.prompt.domain for r in requests))
    length = np.array([len(r.tokens) for r in requests], dtype=np.int64)
    splits = assign_splits(requests, sampling.seed)
    table = Requests(
        start=np.cumsum(length) - length,
        n_prompt=np.array([r.n_prompt for r in requests], dtype=np.int64),
        length=length,
        context_offset=np.zeros_like(length),
        conversation=np.arange(len(requests), dtype=np.int64),
        domain=np.array([domains.index(r.prompt.domain) for r in requests], dtype=np.int64),
        split=np.array([SPLITS.index(s) for s in splits], dtype=np.int64),
        domains=domains,
    )
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
            "n_looped": sum(r.n_looped for r in requests),
            "opening_domain": [r.prompt.opening for r in requests],
            "tokens_of_request_0": requests[0].tokens.tolist(),
        },
    )
    return RoutingTrace.from_arrays(
        np.concatenate([r.expert_ids for r in requests]),
        table,
        metadata,
        gate_weights=np.concatenate([r.gate_weights for r in requests]),
    )
