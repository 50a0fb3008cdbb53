"""Statistics of a routing trace: popularity, locality, similarity, predictability.

Values are means over layers; requests are never joined, so that no lag or window crosses from one
to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_loops import looped_rows
from ndp_gym.trace_predict import next_layer_recall

LAGS = (1, 2, 4, 8, 16, 64)
WINDOWS = (16, 32, 64)
_MAX_PAIRS = 500  # request pairs compared, the first ones in file order

Floats = npt.NDArray[np.float64]
Hot = npt.NDArray[np.bool_]  # [n, L, E], expert e is in the top-k set of that row and layer
ByNumber = dict[int, Floats]
Mean = float | None  # None where the trace is too short to tell


@dataclass(frozen=True, kw_only=True)
class TraceStatistics:
    """Statistics of the rows of one phase; every value is a mean over layers.

    Attributes:
        n_rows: Rows used.
        n_requests: Requests used.
        zipf: Maximum-likelihood Zipf exponent over ranks 1..E, all requests pooled.
        zipf_request: The same per request, mean over requests.
        entropy: Entropy of the pooled popularity / ln E.
        entropy_request: The same per request, mean over requests.
        top10_share: Share of activations of the hottest 10 % of the experts (at least one).
        max_over_mean: Hottest expert over the mean expert, pooled.
        overlap: Share of a row's experts that its request used ``lag`` rows before, by lag.
        overlap_layers: Lowest and highest layer of the lag-1 overlap.
        chance: Lag overlap of independent rows with the pooled popularity.
        chance_request: The same with each request's popularity, mean over requests.
        coverage: Distinct experts of ``W`` consecutive rows / E, by window W.
        coverage_shuffled: The same after shuffling rows within their request.
        prefill_cosine: Cosine of prefill and decode popularity per request and layer.
        prefill_spearman: Rank correlation of the same.
        domain_cosine: Cosine of the popularity of two domains, mean over pairs.
        domain_spearman: Rank correlation of the same.
        request_cosine: Cosine of the popularity of two requests, mean over pairs.
        request_spearman: Rank correlation of the same.
        next_layer_recall: Share of the next layer's experts that co-occurrence with this layer's
            experts predicts (first half of the rows learns, the second half is predicted).
        next_layer_popularity: The same predicted from popularity alone.
        looped_share: Rows inside a repetition (see ``looped_rows``).
        gate_profile: Mean gate weight by rank, largest first, each row scaled to sum 1; or None.
    """

    n_rows: int
    n_requests: int
    zipf: float
    zipf_request: float
    entropy: float
    entropy_request: float
    top10_share: float
    max_over_mean: float
    overlap: dict[int, Mean]
    overlap_layers: tuple[float, float] | None
    chance: float
    chance_request: float
    coverage: dict[int, Mean]
    coverage_shuffled: dict[int, Mean]
    prefill_cosine: Mean
    prefill_spearman: Mean
    domain_cosine: Mean
    domain_spearman: Mean
    request_cosine: Mean
    request_spearman: Mean
    next_layer_recall: Mean
    next_layer_popularity: Mean
    looped_share: Mean
    gate_profile: tuple[float, ...] | None


def trace_statistics(
    trace: RoutingTrace, phase: str = "all", *, seed: int = 0, loops: bool = True
) -> TraceStatistics:
    """All statistics of the rows of a phase.

    Args:
        trace: The recording; its content is checked first.
        phase: ``all``, ``prefill`` or ``decode``.
        seed: Seed of the shuffled control.
        loops: Whether to look for loops (the slowest part).
    """
    trace.check_rows(trace.requests.start, trace.requests.length)
    chosen = phase_spans(trace, phase)
    spans = [(first, last) for _, first, last in chosen]
    lengths = np.array([last - first for first, last in spans])
    counts, overlap, coverage, shuffled = _per_request(trace, spans, np.random.default_rng(seed))
    pooled = counts.sum(axis=0)
    domains = _by_domain(counts, trace.requests.domain[[index for index, _, _ in chosen]])
    prefill = _prefill_similarity(trace)
    domain = _pair_similarity(domains)
    request = _pair_similarity(counts)
    recall = next_layer_recall(trace.expert_ids, spans, trace.n_experts)
    by_layer = overlap[LAGS[0]]
    return TraceStatistics(
        n_rows=int(lengths.sum()),
        n_requests=len(spans),
        zipf=float(zipf_exponent(pooled).mean()),
        zipf_request=float(zipf_exponent(counts).mean()),
        entropy=float(entropy_share(pooled).mean()),
        entropy_request=float(entropy_share(counts).mean()),
        top10_share=float(top_share(pooled).mean()),
        max_over_mean=float((pooled.max(axis=-1) / pooled.mean(axis=-1)).mean()),
        overlap={lag: _mean(layers) for lag, layers in overlap.items()},
        overlap_layers=(float(by_layer.min()), float(by_layer.max())) if len(by_layer) else None,
        chance=float(chance_overlap(pooled, int(lengths.sum())).mean()),
        chance_request=float(chance_overlap(counts, lengths[:, None]).mean()),
        coverage={width: _mean(layers) for width, layers in coverage.items()},
        coverage_shuffled={width: _mean(layers) for width, layers in shuffled.items()},
        prefill_cosine=prefill[0],
        prefill_spearman=prefill[1],
        domain_cosine=domain[0],
        domain_spearman=domain[1],
        request_cosine=request[0],
        request_spearman=request[1],
        next_layer_recall=recall[0],
        next_layer_popularity=recall[1],
        looped_share=_looped_share(trace, spans) if loops else None,
        gate_profile=_gate_profile(trace, spans),
    )


def _per_request(
    trace: RoutingTrace, spans: Sequence[tuple[int, int]], rng: np.random.Generator
) -> tuple[Floats, ByNumber, ByNumber, ByNumber]:
    """Counts ``[R, L, E]``; lag overlap, window coverage and its shuffled control ``[L]``."""
    counts = []
    overlap: dict[int, list[Floats]] = {lag: [] for lag in LAGS}
    coverage: dict[int, list[Floats]] = {width: [] for width in WINDOWS}
    shuffled: dict[int, list[Floats]] = {width: [] for width in WINDOWS}
    for first, last in spans:
        hot = multi_hot(trace.expert_ids[first:last], trace.n_experts)
        counts.append(hot.sum(axis=0, dtype=np.float64))
        mixed = hot[rng.permutation(len(hot))]
        for lag, values in overlap.items():
            values.append(lag_overlap(hot, lag))
        for width in WINDOWS:
            coverage[width].append(window_coverage(hot, width))
            shuffled[width].append(window_coverage(mixed, width))
    by_number = [
        {number: _layer_means(values) for number, values in table.items()}
        for table in (overlap, coverage, shuffled)
    ]
    return np.stack(counts), by_number[0], by_number[1], by_number[2]


def phase_spans(trace: RoutingTrace, phase: str) -> list[tuple[int, int, int]]:
    """(request, first row, row after the last) of the phase, where a request has rows of it."""
    requests = trace.requests
    boundary = requests.start + requests.n_prompt
    ranges = {
        "all": (requests.start, requests.end),
        "prefill": (requests.start, boundary),
        "decode": (boundary, requests.end),
    }
    if phase not in ranges:
        raise ValueError(f"phase must be one of {tuple(ranges)}, got {phase!r}")
    firsts, lasts = ranges[phase]
    used = np.flatnonzero(lasts > firsts)
    if not len(used):
        raise ValueError(f"{trace.name}: no request has rows of phase {phase!r}")
    return [(int(index), int(firsts[index]), int(lasts[index])) for index in used]


def multi_hot(expert_ids: npt.NDArray[np.integer], n_experts: int) -> Hot:
    """Membership ``[n, L, E]`` of ids ``[n, L, K]``."""
    hot = np.zeros((*expert_ids.shape[:2], n_experts), dtype=np.bool_)
    np.put_along_axis(hot, expert_ids.astype(np.int64), True, axis=2)
    return hot


def zipf_exponent(counts: Floats) -> Floats:
    """Maximum-likelihood exponent s of ``p(rank) ~ rank**-s`` over ranks 1..E, per layer.

    Solves "mean log rank under the law = observed" by bisection on 0..8; 0 for uniform counts.
    """
    log_rank = np.log(np.arange(1, counts.shape[-1] + 1))
    ordered = -np.sort(-counts, axis=-1)
    observed = (ordered * log_rank).sum(axis=-1) / ordered.sum(axis=-1)
    low, high = np.zeros(observed.shape), np.full(observed.shape, 8.0)
    for _ in range(50):
        middle = (low + high) / 2
        law = np.exp(-middle[..., None] * log_rank)
        too_flat = (law * log_rank).sum(axis=-1) / law.sum(axis=-1) > observed
        low, high = np.where(too_flat, middle, low), np.where(too_flat, high, middle)
    return low


def entropy_share(counts: Floats) -> Floats:
    """Entropy of the popularity over its maximum ln E, per layer."""
    p = counts / counts.sum(axis=-1, keepdims=True)
    terms = p * np.log(np.where(p > 0, p, 1.0))
    return np.asarray(-terms.sum(axis=-1) / max(np.log(counts.shape[-1]), 1e-12))


def top_share(counts: Floats, share: float = 0.1) -> Floats:
    """Share of activations of the hottest ``round(share * E)`` experts (at least 1), per layer."""
    n = max(1, round(share * counts.shape[-1]))
    return np.asarray(-np.sort(-counts, axis=-1)[..., :n].sum(axis=-1) / counts.sum(axis=-1))


def chance_overlap(counts: Floats, n_rows: npt.ArrayLike) -> Floats:
    """Expected overlap of two independent rows with this popularity, per layer."""
    inclusion = counts / np.asarray(n_rows, dtype=np.float64)[..., None]
    return np.asarray((inclusion**2).sum(axis=-1) / inclusion.sum(axis=-1))


def lag_overlap(hot: Hot, lag: int) -> Floats:
    """Share of each row's experts also used ``lag`` rows before: ``[n - lag, L]``."""
    shared = (hot[lag:] & hot[:-lag]).sum(axis=2)
    return np.asarray(shared / hot[0, 0].sum())


def window_coverage(hot: Hot, width: int) -> Floats:
    """Distinct experts / E in consecutive windows of ``width`` rows: ``[n // width, L]``."""
    n = len(hot) // width
    return np.asarray(hot[: n * width].reshape(n, width, *hot.shape[1:]).any(axis=1).mean(axis=2))


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine along the last axis; 0 where either side is all zero."""
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(axis=-1) / np.where(norm > 0, norm, 1.0))


def spearman(a: Floats, b: Floats) -> Floats:
    """Rank correlation along the last axis, ties at their mean rank; 0 for a constant side."""
    x, y = _mean_ranks(a), _mean_ranks(b)
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    return cosine(x, y)


def _mean_ranks(values: Floats) -> Floats:
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return np.asarray(below + (equal - 1) / 2, dtype=np.float64)


def _looped_share(trace: RoutingTrace, spans: Sequence[tuple[int, int]]) -> float:
    flags = [looped_rows(trace.expert_ids[first:last]) for first, last in spans]
    return float(np.concatenate(flags).mean())


def _gate_profile(
    trace: RoutingTrace, spans: Sequence[tuple[int, int]]
) -> tuple[float, ...] | None:
    if trace.gate_weights is None:
        return None
    total = np.zeros(trace.top_k)
    for first, last in spans:
        gates = -np.sort(-trace.gate_weights[first:last].astype(np.float64), axis=2)
        total += (gates / gates.sum(axis=2, keepdims=True)).mean(axis=1).sum(axis=0)
    return tuple((total / sum(last - first for first, last in spans)).tolist())


def _prefill_similarity(trace: RoutingTrace) -> tuple[Mean, Mean]:
    requests = trace.requests
    cosines, ranks = [], []
    both = (requests.n_prompt > 0) & (requests.n_decode > 0)
    for index in np.flatnonzero(both):
        first, last = int(requests.start[index]), int(requests.end[index])
        hot = multi_hot(trace.expert_ids[first:last], trace.n_experts)
        n_prompt = int(requests.n_prompt[index])
        a = hot[:n_prompt].sum(axis=0, dtype=np.float64)
        b = hot[n_prompt:].sum(axis=0, dtype=np.float64)
        cosines.append(cosine(a, b))
        ranks.append(spearman(a, b))
    return _mean(cosines), _mean(ranks)


def _pair_similarity(counts: Floats) -> tuple[Mean, Mean]:
    pairs = list(islice(combinations(counts, 2), _MAX_PAIRS))
    return _mean([cosine(a, b) for a, b in pairs]), _mean([spearman(a, b) for a, b in pairs])


def _by_domain(counts: Floats, domain: npt.NDArray[np.int64]) -> Floats:
    return np.stack([counts[domain == d].sum(axis=0) for d in np.unique(domain)])


def _mean(values: Sequence[Floats] | Floats) -> Mean:
    return float(np.mean(values)) if len(values) else None


def _layer_means(values: Sequence[Floats]) -> Floats:
    """Mean per layer ``[L]`` over all rows of all requests; empty where there are none."""
    rows = np.concatenate(list(values))
    return np.asarray(rows.mean(axis=0)) if len(rows) else np.zeros(0)
