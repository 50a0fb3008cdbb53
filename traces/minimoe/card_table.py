"""The card's table: statistics of the decode rows, computed here, beside those of real models."""

import numpy as np
import numpy.typing as npt

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_stats import (
    TraceStatistics,
    cosine,
    multi_hot,
    spearman,
    trace_statistics,
    zipf_exponent,
)
from traces.minimoe.real_models import CELLS, MODELS

EARLY_ROWS = 64
Counts = npt.NDArray[np.float64]


def table(trace: RoutingTrace) -> str:
    """Markdown table of ``trace`` (8 or any number of layers) beside the quoted models."""
    ours = statistics_by_name(trace)
    name = f"**{trace.metadata.model}** (E {trace.n_experts}, k {trace.top_k})"
    lines = [("statistic", name, *MODELS), ("---",) * (2 + len(MODELS))]
    lines += [(row, f"**{ours[row]}**", *cells) for row, cells in CELLS.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def statistics_by_name(trace: RoutingTrace) -> dict[str, str]:
    """Our cell for every row of the table."""
    ours = trace_statistics(trace, "decode")
    lag1, layers = ours.overlap[1], ours.overlap_layers or (None, None)
    excess = None if lag1 is None else lag1 - ours.chance_request
    cells = {
        "Zipf exponent, pooled": _f(ours.zipf, digits=2),
        "Zipf exponent, per request": _f(ours.zipf_request, digits=2),
        "Entropy / ln E, pooled; per request": _f(ours.entropy, ours.entropy_request),
        "Share of the hottest 10 %": _f(ours.top10_share),
        "Hottest expert / mean": _f(ours.max_over_mean, digits=1),
        "Reuse at lag 1 (by layer)": f"{_f(lag1)} ({_f(*layers, digits=2, between=' to ')})",
        "Reuse by chance, pooled; per request": _f(ours.chance, ours.chance_request),
        "Lag 1 above chance per request": _f(excess),
        "Looped decode steps": _f(ours.looped_share, digits=4),
        "Mean gate by rank": _f(*(ours.gate_profile or ()), between=" "),
    }
    cells |= {f"Reuse at lag {n}": _f(value) for n, value in ours.overlap.items() if n > 1}
    for width, value in ours.coverage.items():
        shuffled = _f(ours.coverage_shuffled[width])
        cells[f"Coverage of {width} tokens (shuffled)"] = f"{_f(value)} ({shuffled})"
    return cells | _likeness_cells(ours) | _request_cells(trace)


def _likeness_cells(ours: TraceStatistics) -> dict[str, str]:
    recall = f"{_f(ours.next_layer_recall)} ({_f(ours.next_layer_popularity)})"
    return {
        "Domains alike: cosine; Spearman": _f(ours.domain_cosine, ours.domain_spearman, digits=2),
        "Requests alike: cosine; Spearman": _f(
            ours.request_cosine, ours.request_spearman, digits=2
        ),
        "Prompt and answer: cosine; Spearman": _f(
            ours.prefill_cosine, ours.prefill_spearman, digits=2
        ),
        "Next layer, recall@k (popularity only)": recall,
    }


def _request_cells(trace: RoutingTrace) -> dict[str, str]:
    """Cells that ``trace_statistics`` does not have: by domain, by kind of prompt, by time."""
    requests = trace.requests
    middle = requests.start + requests.n_prompt
    prefill = _counts(trace, requests.start, middle)
    early = _counts(trace, middle, middle + EARLY_ROWS)
    late = _counts(trace, middle + EARLY_ROWS, requests.end)
    decode = early + late
    pooled = decode.sum(0)
    openings = trace.metadata.extra["opening_domain"]
    mixed = np.array([opening is not None for opening in openings])
    zipf = [
        float(zipf_exponent(decode[requests.domain == d].sum(0)).mean())
        for d in np.unique(requests.domain)
    ]
    return {
        "Zipf exponent, per domain": _f(min(zipf), max(zipf), digits=2, between=" to "),
        "Coldest expert / mean, worst layer": _f(
            float((pooled.min(1) / pooled.mean(1)).min()), digits=2
        ),
        "- prompt of one domain": _alike(prefill[~mixed], decode[~mixed]),
        "- mixed prompt": _alike(prefill[mixed], decode[mixed]),
        f"First {EARLY_ROWS} decoded and rest: cosine; Spearman": _alike(early, late),
    }


def _counts(
    trace: RoutingTrace, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
) -> Counts:
    """Tokens per expert [R, L, E] of the rows first..last-1 of every request."""
    hot = [
        multi_hot(trace.expert_ids[a:b], trace.n_experts).sum(axis=0, dtype=np.float64)
        for a, b in zip(first, last, strict=True)
    ]
    return np.stack(hot)


def _alike(first: Counts, second: Counts) -> str:
    if not len(first):
        return "-"
    return _f(float(cosine(first, second).mean()), float(spearman(first, second).mean()), digits=2)


def _f(*values: float | None, digits: int = 3, between: str = "; ") -> str:
    """Numbers without the zero before the point, as in the quoted columns; None is ``-``."""
    texts = ("-" if v is None else f"{v:.{digits}f}" for v in values)
    return between.join(
        t.replace("0.", ".", 1) if t.startswith(("0.", "-0.")) else t for t in texts
    )
