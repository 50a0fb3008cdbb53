"""Cache replay: known answers, a slow twin, laws."""

import numpy as np
import pytest
from conftest import make_trace

from ndp_gym.importers import import_trace
from ndp_gym.replay import POLICY_NAMES, replay_cache

SWITCH = "Labeeb2339__stratamoe-lab/evidence/switch-base-8/router-trace.v2.json"

# Hits at capacity 6, 12, 18, 24, 36, as libCacheSim 0.3.5 counts them (not lfu_perfect)
KNOWN = {
    "lru": (234, 354, 452, 633, 956),
    "fifo": (212, 328, 456, 621, 930),
    "lfu": (180, 414, 584, 760, 1022),
    "lfu_perfect": (240, 460, 642, 788, 1046),
    "min": (444, 698, 861, 985, 1155),
}


@pytest.mark.parametrize("policy", KNOWN)
def test_known_answers_of_switch_base_8(shared_traces, policy):
    trace = import_trace([shared_traces / SWITCH]).trace
    for capacity, hits in zip((6, 12, 18, 24, 36), KNOWN[policy], strict=True):
        stats = replay_cache(trace, policy, capacity=capacity)
        assert (stats.requests, stats.hits, stats.misses) == (1290, hits, 1290 - hits)


def slow_hits(keys: list[int], capacity: int, policy: str) -> int:
    """The obvious replay: scan the cache for the victim."""
    inserted: dict[int, int] = {}
    used: dict[int, int] = {}
    count: dict[int, int] = {}
    hits = 0
    rank = {
        "lru": lambda k, ahead: used[k],
        "fifo": lambda k, ahead: inserted[k],
        "lfu": lambda k, ahead: (count[k], used[k]),
        "lfu_perfect": lambda k, ahead: (count[k], used[k]),
        "min": lambda k, ahead: -ahead.index(k) if k in ahead else -len(keys),
    }[policy]
    for now, key in enumerate(keys):
        if key in inserted:
            hits += 1
        else:
            if len(inserted) == capacity:
                ahead = keys[now + 1 :]
                victim = min((rank(k, ahead), k) for k in inserted)[1]
                del inserted[victim]
                if policy == "lfu":
                    del count[victim]
            inserted[key] = now
        used[key] = now
        count[key] = count.get(key, 0) + 1
    return hits


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("capacity", [1, 3, 7, 30])
def test_the_compiled_replay_agrees_with_its_slow_twin(policy, capacity):
    trace = make_trace(n_layers=3, n_experts=5, top_k=2, n_conversations=4, seed=capacity)
    ids = trace.expert_ids.astype(int)
    keys = (ids + 5 * np.arange(3)[:, None]).ravel().tolist()
    assert replay_cache(trace, policy, capacity=capacity).hits == slow_hits(keys, capacity, policy)
    layers = [slow_hits(ids[:, i].ravel().tolist(), capacity, policy) for i in range(3)]
    stats = replay_cache(trace, policy, capacity=capacity, scope="layer")
    assert list(stats.layer_hits) == layers


def test_min_is_never_beaten_and_more_capacity_never_hurts_lru(tiny_trace):
    hits = {
        p: [replay_cache(tiny_trace, p, capacity=c).hits for c in range(9)] for p in POLICY_NAMES
    }
    for policy in POLICY_NAMES:
        assert all(a <= b for a, b in zip(hits[policy], hits["min"], strict=True))
    for policy in ("lru", "min"):
        assert hits[policy] == sorted(hits[policy])
    assert hits["lru"][0] == 0
    assert hits["lru"][8] == tiny_trace.expert_ids.size - 8  # everything fits: one miss per expert


def test_decode_replays_decode_rows_only(tiny_trace):
    requests = tiny_trace.requests
    stats = replay_cache(tiny_trace, "lru", capacity=4, phase="decode")
    assert stats.requests == int(requests.n_decode.sum()) * 2 * 2
    rows = np.concatenate(
        [np.arange(end - n, end) for end, n in zip(requests.end, requests.n_decode, strict=True)]
    )
    layer_keys = np.array([[0], [4]])
    keys = (tiny_trace.expert_ids[rows].astype(int) + layer_keys).ravel().tolist()
    assert stats.hits == slow_hits(keys, 4, "lru")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "arc", "capacity": 4}, "policy must be one of"),
        ({"scope": "gpu", "capacity": 4}, "scope must be one of"),
        ({"phase": "prefill", "capacity": 4}, "phase must be one of"),
        ({"capacity": -1}, "capacity must be a whole number"),
        ({"capacity": 1.5}, "capacity must be a whole number"),
    ],
)
def test_bad_arguments_are_named(tiny_trace, arguments, message):
    with pytest.raises(ValueError, match=message):
        replay_cache(tiny_trace, **arguments)
