"""Recordings and tasks on the toy machine, for tests of evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ndp_gym.evaluation import evaluate
from ndp_gym.quality import QualityModel
from ndp_gym.results import Row
from ndp_gym.rollout import Task
from ndp_gym.trace import Requests, RoutingTrace, TraceMetadata
from tests.toy import MODEL, SYSTEM


def requests_of(lengths: list[int], *, context: int = 0) -> Requests:
    """Requests with one prompt row each, every one a conversation of its own, all in test."""
    length = np.array(lengths, dtype=np.int64)
    n = len(lengths)
    zeros = np.zeros(n, dtype=np.int64)
    return Requests(
        start=np.cumsum(length) - length,
        n_prompt=zeros + 1,
        length=length,
        context_offset=zeros + context,
        conversation=np.arange(n),
        domain=zeros,
        split=zeros + 2,
        domains=("any",),
    )


def toy_trace(lengths: list[int], *, context: int = 0, **metadata: Any) -> RoutingTrace:
    """All rows route to experts 0, 1 in layer 0 and 2, 3 in layer 1, with gates .75 and .25."""
    n_rows = sum(lengths)
    facts = {"model": "toy", "n_experts": 4, "top_k": 2, "id_order": "router_rank", **metadata}
    return RoutingTrace.from_arrays(
        np.tile([[0, 1], [2, 3]], (n_rows, 1, 1)),
        requests_of(lengths, context=context),
        TraceMetadata(**facts),
        gate_weights=np.tile([0.75, 0.25], (n_rows, 2, 1)),
    )


def rows_of(*args: Any, **options: Any) -> dict[str, Row]:
    """Rows of one condition on the toy machine by policy."""
    result = evaluate(*args, MODEL, SYSTEM, **options)
    return {row["policy"]: row for row in result.rows}


def task_of(trace: RoutingTrace, *, batch_size: int) -> Task:
    """A task on the toy machine without HBM for experts."""
    return Task(
        trace=trace,
        model=MODEL,
        system=SYSTEM,
        batch_size=batch_size,
        window=4,
        hbm_budget=0,
        split="test",
        scheduling="continuous",
        quality=QualityModel(),
        quality_weight=4.0,
        max_windows=None,
        profile=None,
    )
