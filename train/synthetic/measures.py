"""The statistics of a recording's card, and the speed of five policies on it, by name."""

from __future__ import annotations

import numpy as np

from ndp_gym.evaluation import evaluate
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_stats import (
    cosine,
    multi_hot,
    phase_spans,
    spearman,
    trace_statistics,
    zipf_exponent,
)

EARLY_ROWS = 64  # decoded rows held against the rest, as on the card
POLICIES = ("lru", "ema", "prefill_topk", "context_aware", "balance")
SYSTEM, BATCH_SIZE, MAX_WINDOWS = "h100_cxl_seed_ndp", 1, 128

# the same numbers as others where there is one request, and where domains are requests or one
_OF_REQUESTS = (
    "Zipf exponent, per request",
    "entropy / ln E, per request",
    "reuse by chance, per request",
)
_OF_DOMAINS = (
    "Zipf exponent, flattest domain",
    "Zipf exponent, steepest domain",
    "two domains, cosine",
    "two domains, Spearman",
)

Values = dict[str, float]


def statistics(trace: RoutingTrace, *, loops: bool) -> Values:
    """Statistics of the decode rows; left out: what it is too short for, what says the same twice.

    Args:
        trace: the recording.
        loops: whether to look for loops, the slowest part.
    """
    s = trace_statistics(trace, "decode", loops=loops)
    lowest, highest = s.overlap_layers or (None, None)
    lag1 = s.overlap[1]
    values: dict[str, float | None] = {
        "Zipf exponent, pooled": s.zipf,
        "Zipf exponent, per request": s.zipf_request,
        "entropy / ln E, pooled": s.entropy,
        "entropy / ln E, per request": s.entropy_request,
        "share of the hottest 10 %": s.top10_share,
        "hottest expert / mean": s.max_over_mean,
        **{f"reuse at lag {lag}": value for lag, value in s.overlap.items()},
        "reuse at lag 1, lowest layer": lowest,
        "reuse at lag 1, highest layer": highest,
        "reuse by chance, pooled": s.chance,
        "reuse by chance, per request": s.chance_request,
        "lag 1 above chance per request": None if lag1 is None else lag1 - s.chance_request,
        **{f"coverage of {width} tokens": value for width, value in s.coverage.items()},
        **{f"coverage of {w} tokens, shuffled": v for w, v in s.coverage_shuffled.items()},
        "prompt and answer, cosine": s.prefill_cosine,
        "prompt and answer, Spearman": s.prefill_spearman,
        "two requests, cosine": s.request_cosine,
        "two requests, Spearman": s.request_spearman,
        "two domains, cosine": s.domain_cosine,
        "two domains, Spearman": s.domain_spearman,
        "next layer, recall@k": s.next_layer_recall,
        "next layer, by popularity only": s.next_layer_popularity,
        "rows in a loop": s.looped_share,
        **_gates(s.gate_profile),
        **_by_request(trace),
    }
    n_domains = len(np.unique(trace.requests.domain))
    same = [
        *(_OF_REQUESTS if len(trace.requests) == 1 else ()),
        *(_OF_DOMAINS if n_domains in (1, len(trace.requests)) else ()),
    ]
    return {n: value for n, value in values.items() if value is not None and n not in same}


def _gates(profile: tuple[float, ...] | None) -> Values:
    if profile is None:
        return {}
    return {
        "gate weight of the first rank": profile[0],
        "gate weight of the last rank": profile[-1],
    }


def _by_request(trace: RoutingTrace) -> dict[str, float | None]:
    """What the card has beyond `trace_statistics`: by domain, by time, the coldest expert."""
    counts, cosines, ranks = [], [], []
    spans = phase_spans(trace, "decode")
    for _, first, last in spans:
        hot = multi_hot(trace.expert_ids[first:last], trace.n_experts)
        counts.append(hot.sum(axis=0, dtype=np.float64))
        if len(hot) > EARLY_ROWS:
            early = hot[:EARLY_ROWS].sum(axis=0, dtype=np.float64)
            cosines.append(cosine(early, counts[-1] - early).mean())
            ranks.append(spearman(early, counts[-1] - early).mean())
    domain = trace.requests.domain[[index for index, _, _ in spans]]
    by_domain = [np.sum([c for c, d in zip(counts, domain, strict=True) if d == one], axis=0)
                 for one in np.unique(domain)]  # fmt: skip
    pooled = np.sum(counts, axis=0)
    zipf = [float(zipf_exponent(each).mean()) for each in by_domain]
    return {
        "Zipf exponent, flattest domain": min(zipf),
        "Zipf exponent, steepest domain": max(zipf),
        "coldest expert / mean, worst layer": float((pooled.min(1) / pooled.mean(1)).min()),
        f"first {EARLY_ROWS} decoded and rest, cosine": _mean(cosines),
        f"first {EARLY_ROWS} decoded and rest, Spearman": _mean(ranks),
    }


def speeds(trace: RoutingTrace) -> Values:
    """Tokens per second of the five policies on the whole recording."""
    result = evaluate(
        POLICIES,
        trace,
        systems=SYSTEM,
        batch_sizes=(BATCH_SIZE,),
        max_windows=MAX_WINDOWS,
        command="python -m train.synthetic",
    )
    found = {row["policy"]: row["tokens_per_s"] for row in result.rows}
    return {f"tokens/s, {name}": value for name in POLICIES if (value := found[name]) is not None}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
