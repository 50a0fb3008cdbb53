"""What a fit looks at: statistics that each govern one amplitude of a profile."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ndp_gym.trace_predict import next_layer_recall
from ndp_gym.trace_requests import Requests
from ndp_gym.trace_stats import chance_overlap, lag_overlap, multi_hot, spearman

_FAR_LAGS = (8, 16)
_MAX_PAIRS = 150
_COVERED_ROWS = 64

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Observed:
    """What the fit compares, of the rows after the prompt; similarities are rank correlations.

    Attributes:
        chance: Overlap of two tokens of a request by its popularity, above K/E ``[L]``.
        fast: Overlap at lag 1 above that at lags 8 and 16 ``[L]``.
        fade: The same at lag 2 as a share of that at lag 1, means over layers.
        slow: The same at lag 4, mean over layers.
        coverage: Share of the experts that 64 independent tokens of a request would use.
        recall: Recall of the next layer from this one, above popularity alone.
        across: Similarity of two requests of different domains; None without such a pair.
        within: The same of one domain.
        early: Similarity of the start of a request and its rest.
        steady: Similarity of the two halves of that rest.
        spread: Standard deviation over domains of the log of ``chance``.
    """

    chance: Floats
    fast: Floats
    fade: float
    slow: float
    coverage: float
    recall: float
    across: float | None
    within: float | None
    early: float
    steady: float
    spread: float


def observe(ids: Ids, requests: Requests, n_experts: int) -> Observed:
    """Statistics of the rows ``[n, L, K]`` of all requests."""
    near: dict[int, list[Floats]] = {lag: [] for lag in (1, 2, 4)}
    counts, far, early, steady, spans = [], [], [], [], []
    for first, last, n_prompt in zip(requests.start, requests.end, requests.n_prompt, strict=True):
        hot = multi_hot(ids[first:last], n_experts)
        start = _start(int(n_prompt), len(hot))
        middle = (start + len(hot)) // 2
        parts = [
            hot[a:b].sum(axis=0, dtype=np.float64)
            for a, b in ((0, start), (start, middle), (middle, len(hot)))
        ]
        early.append(spearman(parts[0], parts[1] + parts[2]).mean())
        steady.append(spearman(parts[1], parts[2]).mean())
        counts.append(parts[1] + parts[2])
        spans.append((int(first) + start, int(last)))
        for lag, found in near.items():
            found.append(lag_overlap(hot[start:], lag))
        far += [lag_overlap(hot[start:], lag) for lag in _FAR_LAGS if lag < len(hot) - start]
    base = np.concatenate(far).mean(axis=0)
    lags = {lag: np.concatenate(found).mean(axis=0) - base for lag, found in near.items()}
    every = np.stack(counts)
    length = np.array([last - first for first, last in spans])
    chance = chance_overlap(every, length[:, None]) - ids.shape[2] / n_experts
    unused = (1 - every / length[:, None, None]) ** _COVERED_ROWS
    informed, popular = next_layer_recall(ids, spans, n_experts)
    same, other = _similarity(every, requests)
    return Observed(
        chance=chance.mean(axis=0),
        fast=lags[1],
        fade=float(lags[2].mean() / max(lags[1].mean(), 0.002)),
        slow=float(lags[4].mean()),
        coverage=float(1 - unused.mean()),
        recall=0.0 if informed is None or popular is None else informed - popular,
        across=other,
        within=same,
        early=float(np.mean(early)),
        steady=float(np.mean(steady)),
        spread=_spread(chance, length, requests),
    )


def _start(n_prompt: int, n_rows: int) -> int:
    """Rows at the start, left out and compared with the rest: the prompt where there is one."""
    return n_prompt if 0 < n_prompt <= n_rows - 8 else max(1, min(64, n_rows // 3))


def _spread(chance: Floats, length: npt.NDArray[np.int64], requests: Requests) -> float:
    by_domain = [
        np.average(chance[mine].mean(axis=1), weights=length[mine])
        for domain in np.unique(requests.domain)
        if (mine := requests.domain == domain).any()
    ]
    return float(np.std(np.log(np.maximum(by_domain, 0.002))))


def _similarity(counts: Floats, requests: Requests) -> tuple[float | None, float | None]:
    """Mean rank correlation of two requests of one domain, and of two; None: no such pair."""
    first, second = np.triu_indices(len(counts), 1)
    apart = requests.conversation[first] != requests.conversation[second]
    alike = requests.domain[first] == requests.domain[second]
    means: list[float | None] = []
    for pairs in (np.flatnonzero(apart & alike), np.flatnonzero(apart & ~alike)):
        step = max(1, len(pairs) // _MAX_PAIRS)
        values = [
            spearman(counts[first[p]], counts[second[p]]).mean() for p in pairs[::step][:_MAX_PAIRS]
        ]
        means.append(float(np.mean(values)) if values else None)
    return means[0], means[1]
