"""What a page about a recording draws: popularity, reuse, coverage, drift and similarity as series.

Definitions are those of `trace_stats`, at more lags and windows, of the rows of one phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_stats import (
    cosine,
    lag_overlap,
    multi_hot,
    phase_spans,
    spearman,
    window_coverage,
)

LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)
DRIFT_ROWS = 40  # of the two neighbouring windows that are compared; shows nvmoe's joints
_MAX_VALUES = 60_000_000  # rows x layers x experts of the requests that are read
_MAX_DRIFT_ROWS = 4000
_MAX_CONVERSATIONS = 40
_DRIFT_STEP = 4
_CHANGE_RANGES = 3.0  # interquartile ranges below the median that make a change point

Floats = npt.NDArray[np.float64]
Line = dict[int, float]  # value by lag or window


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Likeness of neighbouring windows along the recording.

    Attributes:
        rows: Places between two windows of ``DRIFT_ROWS`` rows, counted in rows shown.
        likeness: Cosine of their popularities, mean over layers.
        level: Likeness below which a lowest place is a change point.
        changes: The change points.
        boundaries: Where requests begin.
        n_rows: Rows shown.
        is_all: Whether these are all rows of the phase.
    """

    rows: npt.NDArray[np.int64]
    likeness: Floats
    level: float
    changes: tuple[int, ...]
    boundaries: tuple[int, ...]
    n_rows: int
    is_all: bool


@dataclass(frozen=True, kw_only=True)
class Series:
    """Everything the page draws.

    Attributes:
        n_rows: Rows read.
        n_requests: Requests read, evenly chosen where the recording is large.
        popularity: Use of every expert over the mean expert's ``[L, E]``.
        by_rank: The same, hottest first, mean over layers ``[E]``.
        by_rank_request: The same of single requests, mean over requests and layers ``[E]``.
        overlap: Reuse by lag.
        overlap_shuffled: The same after shuffling rows within their request.
        coverage: Distinct experts / E by window.
        coverage_shuffled: The same after shuffling.
        prefill: Rank correlation of prefill and decode popularity by layer ``[L]``, mean over
            requests; None where no request has both.
        prefill_other: The same with the prefill of the next request; None with one request.
        drift: Along the recording; None where it is too short.
        likeness: Rank correlation of the popularity of two conversations ``[C, C]``, mean over
            layers.
        conversations: Their numbers, by domain.
        domains: Their domains.
    """

    n_rows: int
    n_requests: int
    popularity: Floats
    by_rank: Floats
    by_rank_request: Floats
    overlap: Line
    overlap_shuffled: Line
    coverage: Line
    coverage_shuffled: Line
    prefill: Floats | None
    prefill_other: Floats | None
    drift: Drift | None
    likeness: Floats
    conversations: tuple[int, ...]
    domains: tuple[str, ...]


def trace_series(trace: RoutingTrace, phase: str = "all", *, seed: int = 0) -> Series:
    """The series of the rows of a phase; of a large recording from some of its requests.

    Args:
        trace: The recording.
        phase: ``all``, ``prefill`` or ``decode``; prefill against decode always uses both.
        seed: Of the shuffled controls.
    """
    chosen = _chosen(trace, phase_spans(trace, phase))
    rng = np.random.default_rng(seed)
    counts = []
    overlap, mixed_overlap = (_empty(LAGS) for _ in range(2))
    coverage, mixed_coverage = (_empty(WINDOWS) for _ in range(2))
    for _, first, last in chosen:
        hot = multi_hot(trace.expert_ids[first:last], trace.n_experts)
        counts.append(hot.sum(axis=0, dtype=np.float64))
        shuffled = hot[rng.permutation(len(hot))]
        for rows, lags, widths in (
            (hot, overlap, coverage),
            (shuffled, mixed_overlap, mixed_coverage),
        ):
            for lag in LAGS:
                lags[lag].append(lag_overlap(rows, lag).mean(axis=1))
            for width in WINDOWS:
                widths[width].append(window_coverage(rows, width).mean(axis=1))
    each = np.stack(counts)
    pooled = each.sum(axis=0)
    numbers = [index for index, _, _ in chosen]
    prefill, other = _prefill(trace, numbers)
    likeness, conversations, domains = _likeness(trace, numbers, each)
    return Series(
        n_rows=sum(last - first for _, first, last in chosen),
        n_requests=len(chosen),
        popularity=_relative(pooled),
        by_rank=_ranked(pooled).mean(axis=0),
        by_rank_request=_ranked(each).mean(axis=(0, 1)),
        overlap=_means(overlap),
        overlap_shuffled=_means(mixed_overlap),
        coverage=_means(coverage),
        coverage_shuffled=_means(mixed_coverage),
        prefill=prefill,
        prefill_other=other,
        drift=_drift(trace, phase_spans(trace, phase)),
        likeness=likeness,
        conversations=conversations,
        domains=domains,
    )


def _empty(keys: Sequence[int]) -> dict[int, list[npt.NDArray[np.float64]]]:
    return {key: [] for key in keys}


def _chosen(
    trace: RoutingTrace, spans: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Requests evenly over the file, together at most ``_MAX_VALUES``; at least one."""
    values = sum(last - first for _, first, last in spans) * trace.n_layers * trace.n_experts
    return list(spans[:: max(1, -(-values // _MAX_VALUES))])


def _relative(counts: Floats) -> Floats:
    return np.asarray(counts / counts.mean(axis=-1, keepdims=True))


def _ranked(counts: Floats) -> Floats:
    return -np.sort(-_relative(counts), axis=-1)


def _means(table: dict[int, list[Floats]]) -> Line:
    joined = {number: np.concatenate(values) for number, values in table.items()}
    return {number: float(values.mean()) for number, values in joined.items() if len(values)}


def _prefill(trace: RoutingTrace, numbers: Sequence[int]) -> tuple[Floats | None, Floats | None]:
    requests = trace.requests
    pairs = []
    for index in numbers:
        first, last = int(requests.start[index]), int(requests.end[index])
        middle = first + int(requests.n_prompt[index])
        if first < middle < last:
            hot = multi_hot(trace.expert_ids[first:last], trace.n_experts)
            n_prompt = middle - first
            pairs.append((hot[:n_prompt].sum(axis=0), hot[n_prompt:].sum(axis=0)))
    if not pairs:
        return None, None
    prompts, answers = (np.stack(part).astype(np.float64) for part in zip(*pairs, strict=True))
    own = spearman(prompts, answers).mean(axis=0)
    if len(pairs) == 1:
        return own, None
    return own, spearman(np.roll(prompts, -1, axis=0), answers).mean(axis=0)


def _likeness(
    trace: RoutingTrace, numbers: Sequence[int], counts: Floats
) -> tuple[Floats, tuple[int, ...], tuple[str, ...]]:
    """Every domain's conversations side by side, evenly chosen."""
    conversation, domain = trace.requests.conversation[numbers], trace.requests.domain[numbers]
    unique, first = np.unique(conversation, return_index=True)
    order = np.lexsort((unique, domain[first]))
    order = order[:: max(1, -(-len(order) // _MAX_CONVERSATIONS))]
    summed = np.stack([counts[conversation == unique[i]].sum(axis=0) for i in order])
    likeness = np.stack([spearman(summed, one).mean(axis=-1) for one in summed])
    names = tuple(trace.requests.domains[domain[first[i]]] for i in order)
    return likeness, tuple(unique[order].tolist()), names


def _drift(trace: RoutingTrace, spans: Sequence[tuple[int, int, int]]) -> Drift | None:
    """Windows before and after every fourth row of the first rows of the phase, joined."""
    rows: list[npt.NDArray[np.int64]] = []
    boundaries, n_rows = [], 0
    for _, first, last in spans:
        boundaries.append(n_rows)
        rows.append(np.arange(first, min(last, first + _MAX_DRIFT_ROWS - n_rows)))
        n_rows += len(rows[-1])
        if n_rows >= _MAX_DRIFT_ROWS:
            break
    if n_rows < 3 * DRIFT_ROWS:
        return None
    places = np.arange(DRIFT_ROWS, n_rows - DRIFT_ROWS + 1, _DRIFT_STEP)
    likeness = np.zeros(len(places))
    ids = trace.expert_ids[np.concatenate(rows)]
    for layer in range(trace.n_layers):
        hot = multi_hot(ids[:, layer : layer + 1], trace.n_experts)[:, 0]
        total = np.concatenate([np.zeros((1, hot.shape[1])), np.cumsum(hot, axis=0)])
        middle = total[places]
        before = middle - total[places - DRIFT_ROWS]
        likeness += cosine(before, total[places + DRIFT_ROWS] - middle) / trace.n_layers
    low, median, high = np.percentile(likeness, (25, 50, 75))
    level = float(median - _CHANGE_RANGES * (high - low))
    return Drift(
        rows=places,
        likeness=likeness,
        level=level,
        changes=_lowest(places, likeness, level),
        boundaries=tuple(boundaries),
        n_rows=n_rows,
        is_all=n_rows == sum(last - first for _, first, last in spans),
    )


def _lowest(places: npt.NDArray[np.int64], likeness: Floats, level: float) -> tuple[int, ...]:
    """Places of least likeness within a window on either side, below ``level``."""
    found = []
    for index in np.flatnonzero(likeness < level):
        near = np.abs(places - places[index]) <= DRIFT_ROWS
        if index == np.flatnonzero(near)[np.argmin(likeness[near])]:
            found.append(int(places[index]))
    return tuple(found)
