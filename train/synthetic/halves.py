"""Two halves of a recording, in several ways: by conversation, or by time where there are few."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS, Requests

ENOUGH_CONVERSATIONS = 16
N_SPLITS = 8
PROMPT_SHARE = 4  # of a half in time, one row in this many is its prompt
TEST = SPLITS.index("test")

Table = npt.NDArray[np.int64]
Halves = tuple[RoutingTrace, RoutingTrace]


def is_by_conversation(trace: RoutingTrace) -> bool:
    """Whether the recording has conversations enough to be halved by them."""
    return trace.requests.n_conversations >= ENOUGH_CONVERSATIONS


def halves(trace: RoutingTrace, *, seed: int = 0) -> Iterator[Halves]:
    """Up to ``N_SPLITS`` different splits into two halves; fit on the first half of the first one.

    By conversation: half of every domain's conversations, drawn anew for every split. By time:
    every request is cut in its middle, and which of its parts belongs to the first half is drawn
    (first parts together in the first split); a quarter of each part is its prompt.
    """
    splits = _by_conversation if is_by_conversation(trace) else _in_time
    for first, second in splits(trace, np.random.default_rng(seed)):
        yield part(trace, first), part(trace, second)


def part(trace: RoutingTrace, table: Table) -> RoutingTrace:
    """The rows of the spans of a request table as a recording of their own, all of it ``test``."""
    rows = np.concatenate([np.arange(start, start + n) for start, n in table[:, [0, 2]]])
    table = table.copy()
    table[:, 0] = np.cumsum(table[:, 2]) - table[:, 2]
    table[:, 6] = TEST
    gates = None if trace.gate_weights is None else trace.gate_weights[rows]
    requests = Requests.from_table(table, trace.requests.domains)
    return RoutingTrace.from_arrays(
        trace.expert_ids[rows], requests, trace.metadata, gate_weights=gates
    )


def _by_conversation(
    trace: RoutingTrace, rng: np.random.Generator
) -> Iterator[tuple[Table, Table]]:
    table = trace.requests.table()
    for _ in range(N_SPLITS):
        chosen: list[int] = []
        for number, domain in enumerate(np.unique(table[:, 5])):
            mine = rng.permutation(np.unique(table[table[:, 5] == domain, 4]))
            chosen += mine[: (len(mine) + number % 2) // 2].tolist()
        first = np.isin(table[:, 4], chosen)
        yield table[first], table[~first]


def _in_time(trace: RoutingTrace, rng: np.random.Generator) -> Iterator[tuple[Table, Table]]:
    early = trace.requests.table()
    early = early[early[:, 2] >= 2 * PROMPT_SHARE]
    late = early.copy()
    early[:, 2] //= 2
    late[:, 0] += early[:, 2]
    late[:, 2] -= early[:, 2]
    for table in (early, late):
        table[:, 1] = table[:, 2] // PROMPT_SHARE
    n_different = 2 ** (len(early) - 1)
    choices = [0, *(1 + rng.permutation(n_different - 1)[: N_SPLITS - 1])]
    for choice in choices:
        swap = (choice >> np.arange(len(early)) & 1).astype(bool)[:, None]
        yield np.where(swap, late, early), np.where(swap, early, late)
