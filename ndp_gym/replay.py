"""Cache replay of a routing trace: hits of a cache of experts under a named eviction rule.

A model of hits only, with experts of equal size and every miss admitted; time is not simulated.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import IntArray

PolicyName = Literal["lru", "fifo", "lfu", "lfu_perfect", "min"]
POLICY_NAMES: tuple[PolicyName, ...] = ("lru", "fifo", "lfu", "lfu_perfect", "min")


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a replay counted.

    Attributes:
        policy: The eviction rule.
        capacity: Experts the cache holds; per layer where ``scope`` is "layer".
        scope: "global" (one cache) or "layer" (one per layer).
        phase: "all" rows, or "decode" rows only.
        requests: Routed (token, layer, expert) requests that were counted.
        hits: Those found in the cache.
        layer_hits: Hits per layer.
    """

    policy: str
    capacity: int
    scope: str
    phase: str
    requests: int
    hits: int
    layer_hits: tuple[int, ...]

    @property
    def misses(self) -> int:
        """Requests that were not found; each brings its expert into the cache."""
        return self.requests - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits per request, in 0..1."""
        return self.hits / self.requests


def replay_cache(
    trace: RoutingTrace,
    policy: PolicyName = "lru",
    *,
    capacity: int,
    scope: Literal["global", "layer"] = "global",
    phase: Literal["all", "decode"] = "all",
) -> CacheStats:
    """Replay all requests of the trace, in file order, through one cache that starts empty.

    Order is token, then layer, then rank as recorded. Eviction rules: ``lru``; ``fifo``; ``lfu``
    drops an expert's count when it is evicted, ``lfu_perfect`` keeps it (both evict the least
    recently used of equal counts); ``min`` evicts the expert used latest in the future, which no
    rule that admits every miss can beat (Belady 1966). Checked against libCacheSim 0.3.5.

    Args:
        trace: The recording; the rows replayed are checked first.
        policy: Eviction rule.
        capacity: Experts held, at least 0; per layer for ``scope="layer"``.
        scope: One cache for all layers, or one per layer.
        phase: All rows, or the decode rows only (prefill rows are then skipped, not replayed).

    Raises:
        ValueError: An unknown name, a negative capacity, or no row of the phase.
    """
    _check("policy", policy, POLICY_NAMES)
    _check("scope", scope, ("global", "layer"))
    _check("phase", phase, ("all", "decode"))
    if not isinstance(capacity, int | np.integer) or isinstance(capacity, bool) or capacity < 0:
        raise ValueError(f"capacity must be a whole number >= 0, got {capacity!r}")
    from ndp_gym import replay_kernel as kernel

    ids = trace.expert_ids[_rows(trace, phase)].astype(np.int64)
    n_layers, n_experts = trace.n_layers, trace.n_experts
    code = POLICY_NAMES.index(policy)
    if scope == "global":
        keys = ids + n_experts * np.arange(n_layers)[:, None]
        hits = kernel.replay(keys.reshape(-1), n_layers * n_experts, int(capacity), code)
        by_layer = hits.reshape(ids.shape).sum(axis=(0, 2))
    else:
        streams = [np.ascontiguousarray(ids[:, i]).reshape(-1) for i in range(n_layers)]
        replays = [kernel.replay(keys, n_experts, int(capacity), code) for keys in streams]
        by_layer = np.array([hits.sum() for hits in replays])
    return CacheStats(
        policy=policy,
        capacity=int(capacity),
        scope=scope,
        phase=phase,
        requests=int(ids.size),
        hits=int(by_layer.sum()),
        layer_hits=tuple(by_layer.tolist()),
    )


def _rows(trace: RoutingTrace, phase: str) -> IntArray:
    """Rows of the phase in file order; rows outside all requests are left out."""
    requests = trace.requests
    trace.check_rows(requests.start, requests.length)
    first = requests.start if phase == "all" else requests.start + requests.n_prompt
    n_rows = requests.end - first
    if n_rows.sum() == 0:
        raise ValueError(f"{trace.name}: no request has rows of phase {phase!r}")
    before = np.cumsum(n_rows) - n_rows
    return np.asarray(np.arange(int(n_rows.sum())) + np.repeat(first - before, n_rows))


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
