"""Fitting a routing profile to a recording: draw, compare, adjust.

Every round draws a synthetic recording with the requests, lengths and domains of the real one, so
that both have the bias of short samples, and moves each amplitude by the statistic it governs.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ndp_gym.synthesize.generate import Generator, Shape
from ndp_gym.synthesize.observe import Floats, Ids, Observed, observe
from ndp_gym.synthesize.profile import RoutingProfile, gates_for
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import Requests

MAX_ROWS, MAX_VALUES = 4000, 6_000_000  # whole requests, every domain in turn; rows x layers x E
ROUNDS = 24
_LEAST_ROWS = 8  # of a request that is used
_FULL = 0.97  # of the coupling, from which the hidden state gets fewer dimensions
_COLD_STEP, _SLOW_STEP = 4.0, 1.0
_AVERAGED = 12  # last rounds whose parameters are averaged
_RANK, _LEAST_RANK = 4, 3  # fewer dimensions of the hidden state couple more, and cover less


def fit_profile(trace: RoutingTrace, *, seed: int = 0, rounds: int = ROUNDS) -> RoutingProfile:
    """The profile whose synthetic recordings have the statistics of ``trace``.

    Uses at most 4000 rows, those after the prompts for all but the likeness of prompt and answer.
    Domains and conversations are told apart only where a domain has several conversations;
    otherwise half of what requests do not share counts as the domain's.

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
    wanted = observe(ids, requests, shape.n_experts)
    profile = RoutingProfile(
        popularity=(0.6,) * shape.n_layers,
        model_share=0.2,
        domain_share=0.4,
        fast=(0.3,) * shape.n_layers,
        slow=0.05,
        coupling=0.5,
        rank=max(2, min(_RANK, shape.n_experts // 2)),
    )
    visited = []
    for number in range(rounds):
        generator = Generator(profile, shape, seed=seed * 1000 + number)
        drawn = np.concatenate([piece.expert_ids for piece in generator.pieces(requests)])
        got = observe(drawn, requests, shape.n_experts)
        profile = _adjusted(profile, wanted, got, gain=1.0 if number < rounds // 2 else 0.4)
        if number == rounds // 3 and profile.coupling > _FULL:
            profile = replace(profile, rank=min(profile.rank, _LEAST_RANK))
        visited.append(profile)
    gates = gates_for(_mean_gates(trace), shape.top_k)
    return replace(_mean(visited[-_AVERAGED:]), gates=gates)


def _sample(trace: RoutingTrace) -> tuple[Ids, Requests]:
    """Ids and table of whole requests, domains in turn, up to ``MAX_ROWS`` and ``MAX_VALUES``."""
    requests = trace.requests
    usable = np.flatnonzero(requests.length >= _LEAST_ROWS)
    rank = np.zeros(len(usable), dtype=np.int64)
    for domain in np.unique(requests.domain[usable]):
        mine = requests.domain[usable] == domain
        rank[mine] = np.arange(mine.sum())
    order = usable[np.argsort(rank, kind="stable")]
    most = min(MAX_ROWS, MAX_VALUES // (trace.n_layers * trace.n_experts))
    total = np.cumsum(requests.length[order])
    chosen = np.sort(order[: max(1, int((total <= most).sum()))])
    ids = np.concatenate(
        [trace.window(int(requests.start[i]), int(requests.length[i]))[0] for i in chosen]
    )
    columns = requests.table()[chosen]
    columns[:, 0] = np.cumsum(columns[:, 2]) - columns[:, 2]
    return ids, Requests.from_table(columns, requests.domains)


def _adjusted(
    profile: RoutingProfile, wanted: Observed, got: Observed, gain: float
) -> RoutingProfile:
    """Every amplitude or share moved by the statistic that it governs."""
    step = gain / 2
    popularity = np.array(profile.popularity) * _ratio(wanted.chance, got.chance) ** step
    popularity *= _ratio(wanted.chance.mean(), got.chance.mean()) ** step
    fast = np.array(profile.fast) * _ratio(wanted.fast, got.fast) ** gain
    slow = profile.slow + _SLOW_STEP * gain * (wanted.slow - got.slow)
    fast_rows = profile.fast_rows * float(_ratio(wanted.fade, got.fade)) ** (step / 2)
    fast_rows *= float(_ratio(wanted.fast.mean(), got.fast.mean())) ** step
    coupling = profile.coupling * float(_ratio(wanted.recall, got.recall)) ** gain
    cold = profile.cold + _COLD_STEP * gain * (got.coverage - wanted.coverage)
    spread = profile.domain_spread + step * (wanted.spread - got.spread)
    drift = float(np.clip(profile.drift_share + step * (got.steady - wanted.steady), 0, 0.9))
    ahead = got.early - got.steady - wanted.early + wanted.steady
    prompt = float(np.clip(profile.prompt_share + step * ahead, 0, 0.9))
    model, domain = _shares(profile, wanted, got, step)
    excess = max(1.0, (model + domain + drift + prompt) / 0.98)
    return replace(
        profile,
        popularity=tuple(np.clip(popularity, 0.01, 20).tolist()),
        fast=tuple(np.clip(fast, 0.001, 0.99).tolist()),
        slow=float(np.clip(slow, 0, 0.6)),
        coupling=float(np.clip(coupling, 0.005, 0.99)),
        fast_rows=float(np.clip(fast_rows, 0.7, 4)),
        cold=float(np.clip(cold, 0, 4)),
        domain_spread=float(np.clip(spread, 0, 1)),
        model_share=model / excess,
        drift_share=drift / excess,
        prompt_share=prompt / excess,
        domain_share=domain / excess,
    )


def _shares(
    profile: RoutingProfile, wanted: Observed, got: Observed, step: float
) -> tuple[float, float]:
    """Shares of the model and of the domain; one alone is known where one kind of pair is."""
    model, domain = profile.model_share, profile.domain_share
    if wanted.across is not None and got.across is not None:
        model += step * (wanted.across - got.across)
        if wanted.within is not None and got.within is not None:
            domain += step * (wanted.within - got.within - wanted.across + got.across)
        else:
            domain = (1 - profile.drift_share - profile.prompt_share - model) / 2
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
        coupling=scalar("coupling"),
        fast_rows=scalar("fast_rows"),
        cold=scalar("cold"),
        domain_spread=scalar("domain_spread"),
        model_share=scalar("model_share"),
        domain_share=scalar("domain_share"),
        drift_share=scalar("drift_share"),
        prompt_share=scalar("prompt_share"),
    )


def _mean_gates(trace: RoutingTrace) -> tuple[float, ...] | None:
    """Mean weight by rank of the rows after the prompt, of at most 65536; None without weights."""
    if trace.gate_weights is None:
        return None
    requests, total, left = trace.requests, np.zeros(trace.top_k), 65536
    for first, last in zip(requests.start + requests.n_prompt, requests.end, strict=True):
        rows = trace.gate_weights[first : min(last, first + left)].astype(np.float64)
        gates = -np.sort(-rows, axis=2)
        total += (gates / gates.sum(axis=2, keepdims=True)).mean(axis=1).sum(axis=0)
        left -= len(rows)
    return tuple((total / total.sum()).tolist()) if total.any() else None
