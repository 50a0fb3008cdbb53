"""Fitting a routing profile to a recording: draw, compare, adjust.

Every round draws a synthetic recording with the requests, lengths and domains of the real one, so
that both have the bias of short samples, and moves each amplitude by the statistic it governs.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ndp_gym.synthesize.generate import Generator, Shape
from ndp_gym.synthesize.profile import RoutingProfile, gates_for
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_predict import next_layer_recall
from ndp_gym.trace_requests import Requests
from ndp_gym.trace_stats import chance_overlap, lag_overlap, multi_hot, spearman

MAX_ROWS = 6000  # of the recording, whole requests, every domain in turn
ROUNDS = 24
_AVERAGED = 12  # last rounds whose parameters are averaged
_FAR_LAGS = (8, 16)
_MAX_PAIRS = 150
_RANK = 4  # more dimensions lower the recall of the next layer, fewer the coverage

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class _Statistics:
    """What the fit compares; similarities are rank correlations of popularity.

    Attributes:
        chance: Overlap of two tokens of a request by its popularity, above K/E ``[L]``.
        fast: Overlap at lag 1 above that at lags 8 and 16 ``[L]``.
        slow: The same at lag 4, mean over layers.
        recall: Recall of the next layer from this one, above popularity alone.
        across: Similarity of two requests of different domains; None without such a pair.
        within: The same of one domain.
        early: Similarity of the start of a request and its rest.
    """

    chance: Floats
    fast: Floats
    slow: float
    recall: float
    across: float | None
    within: float | None
    early: float


def fit_profile(trace: RoutingTrace, *, seed: int = 0, rounds: int = ROUNDS) -> RoutingProfile:
    """The profile whose synthetic recordings have the statistics of ``trace``.

    Uses at most 6000 rows. Domains and conversations are told apart only where a domain has several
    conversations; otherwise half of what requests do not share counts as the domain's.

    Raises:
        ValueError: No request has 32 rows, or every token uses all experts.
    """
    shape = Shape(n_layers=trace.n_layers, n_experts=trace.n_experts, top_k=trace.top_k)
    if shape.top_k == shape.n_experts or int(trace.requests.length.max()) < 32:
        raise ValueError(
            f"{trace.name}: must have a request of at least 32 rows and top_k below n_experts "
            f"to be imitated, got {int(trace.requests.length.max())} rows, "
            f"top-{shape.top_k} of {shape.n_experts}"
        )
    ids, requests = _sample(trace)
    wanted = _statistics(ids, requests, shape.n_experts)
    profile = RoutingProfile(
        popularity=(0.6,) * shape.n_layers,
        model_share=0.2,
        domain_share=0.4,
        fast=(0.6,) * shape.n_layers,
        slow=0.2,
        token=1.0,
        rank=max(2, min(_RANK, shape.n_experts // 2)),
    )
    visited = []
    for number in range(rounds):
        generator = Generator(profile, shape, seed=seed * 1000 + number)
        drawn = np.concatenate([piece.expert_ids for piece in generator.pieces(requests)])
        got = _statistics(drawn, requests, shape.n_experts)
        profile = _adjusted(profile, wanted, got, gain=1.0 if number < rounds // 2 else 0.4)
        visited.append(profile)
    gates = gates_for(_mean_gates(trace), shape.top_k)
    return replace(_mean(visited[-_AVERAGED:]), gates=gates)


def _sample(trace: RoutingTrace) -> tuple[Ids, Requests]:
    """Ids and table of whole requests, domains in turn, up to ``MAX_ROWS`` rows."""
    requests = trace.requests
    usable = np.flatnonzero(requests.length >= min(32, int(requests.length.max())))
    rank = np.zeros(len(usable), dtype=np.int64)
    for domain in np.unique(requests.domain[usable]):
        mine = requests.domain[usable] == domain
        rank[mine] = np.arange(mine.sum())
    order = usable[np.argsort(rank, kind="stable")]
    total = np.cumsum(requests.length[order])
    chosen = np.sort(order[: max(1, int((total <= MAX_ROWS).sum()))])
    ids = np.concatenate(
        [trace.window(int(requests.start[i]), int(requests.length[i]))[0] for i in chosen]
    )
    columns = requests.table()[chosen]
    columns[:, 0] = np.cumsum(columns[:, 2]) - columns[:, 2]
    return ids, Requests.from_table(columns, requests.domains)


def _statistics(ids: Ids, requests: Requests, n_experts: int) -> _Statistics:
    spans = [(int(a), int(b)) for a, b in zip(requests.start, requests.end, strict=True)]
    counts, lag1, lag4, far, early = [], [], [], [], []
    for (first, last), n_prompt in zip(spans, requests.n_prompt, strict=True):
        hot = multi_hot(ids[first:last], n_experts)
        counts.append(hot.sum(axis=0, dtype=np.float64))
        lag1.append(lag_overlap(hot, 1))
        lag4.append(lag_overlap(hot, 4))
        start = hot[: _start(int(n_prompt), len(hot))].sum(axis=0, dtype=np.float64)
        early.append(spearman(start, counts[-1] - start).mean())
        far += [lag_overlap(hot, lag) for lag in _FAR_LAGS if lag < len(hot)]
    informed, popular = next_layer_recall(ids, spans, n_experts)
    chance = chance_overlap(np.stack(counts), requests.length[:, None])
    base = np.concatenate(far).mean(axis=0)
    same, other = _similarity(np.stack(counts), requests)
    return _Statistics(
        chance=np.average(chance, axis=0, weights=requests.length) - ids.shape[2] / n_experts,
        fast=np.concatenate(lag1).mean(axis=0) - base,
        slow=float((np.concatenate(lag4).mean(axis=0) - base).mean()),
        recall=0.0 if informed is None or popular is None else informed - popular,
        across=other,
        within=same,
        early=float(np.mean(early)),
    )


def _start(n_prompt: int, n_rows: int) -> int:
    """Rows at the start that are compared with the rest: the prompt where there is one."""
    return n_prompt if 0 < n_prompt < n_rows else max(1, min(64, n_rows // 3))


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


def _adjusted(
    profile: RoutingProfile, wanted: _Statistics, got: _Statistics, gain: float
) -> RoutingProfile:
    """Amplitudes times the root of wanted over got, shares moved by the difference."""
    power, step = gain / 2, gain / 2
    popularity = np.array(profile.popularity) * _ratio(wanted.chance, got.chance) ** power
    fast = np.array(profile.fast) * _ratio(wanted.fast, got.fast) ** power
    slow = profile.slow * float(_ratio(wanted.slow, got.slow)) ** power
    token = profile.token * float(_ratio(wanted.recall, got.recall)) ** gain
    drift = float(np.clip(profile.drift_share + step * (got.early - wanted.early), 0, 0.9))
    model, domain = _shares(profile, wanted, got, step)
    excess = max(1.0, (model + domain + drift) / 0.98)
    return replace(
        profile,
        popularity=tuple(np.clip(popularity, 0.01, 8).tolist()),
        fast=tuple(np.clip(fast, 0.02, 8).tolist()),
        slow=float(np.clip(slow, 0.02, 8)),
        token=float(np.clip(token, 0.02, 8)),
        model_share=model / excess,
        drift_share=drift / excess,
        domain_share=domain / excess,
    )


def _shares(
    profile: RoutingProfile, wanted: _Statistics, got: _Statistics, step: float
) -> tuple[float, float]:
    """Shares of the model and of the domain; one alone is known where one kind of pair is."""
    model, domain = profile.model_share, profile.domain_share
    if wanted.across is not None and got.across is not None:
        model += step * (wanted.across - got.across)
        if wanted.within is not None and got.within is not None:
            domain += step * (wanted.within - got.within - wanted.across + got.across)
        else:
            domain = (1 - profile.drift_share - model) / 2
    elif wanted.within is not None and got.within is not None:
        model = domain = (model + domain + step * (wanted.within - got.within)) / 2
    return float(np.clip(model, 0, 0.9)), float(np.clip(domain, 0, 0.9))


def _ratio(wanted: npt.ArrayLike, got: npt.ArrayLike) -> Floats:
    """Wanted over got, both at least .002, within 0.4..2.5."""
    low = 0.002
    return np.asarray(np.clip(np.maximum(wanted, low) / np.maximum(got, low), 0.4, 2.5))


def _mean(profiles: list[RoutingProfile]) -> RoutingProfile:
    def scalar(name: str) -> float:
        return float(np.mean([getattr(p, name) for p in profiles]))

    def layers(name: str) -> tuple[float, ...]:
        return tuple(np.mean([getattr(p, name) for p in profiles], axis=0).tolist())

    return replace(
        profiles[-1],
        popularity=layers("popularity"),
        fast=layers("fast"),
        slow=scalar("slow"),
        token=scalar("token"),
        model_share=scalar("model_share"),
        domain_share=scalar("domain_share"),
        drift_share=scalar("drift_share"),
    )


def _mean_gates(trace: RoutingTrace) -> tuple[float, ...] | None:
    if trace.gate_weights is None:
        return None
    total = np.zeros(trace.top_k)
    for first in range(0, min(trace.n_rows, 65536), 4096):
        gates = -np.sort(-trace.gate_weights[first : first + 4096].astype(np.float64), axis=2)
        total += (gates / gates.sum(axis=2, keepdims=True)).mean(axis=1).sum(axis=0)
    return tuple((total / total.sum()).tolist())
