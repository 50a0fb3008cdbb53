"""Integers of the public recordings that validation.md §3 and §5 item 1 fix."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.importers import import_trace
from ndp_gym.importers.hdmoe import PREFIX, read_layers, request_starts
from ndp_gym.importers.source import open_source
from ndp_gym.trace import RoutingTrace

NVMOE = "BrianBoitano__nvmoe/traces"
TOKENS = {
    "coding": 12138,
    "extraction": 10054,
    "humanities": 12414,
    "math": 10307,
    "reasoning": 8386,
    "roleplay": 10511,
    "stem": 11396,
    "writing": 12622,
}


def counts(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Tokens per (layer, expert) of ids [n, L, K]."""
    return np.stack(
        [np.bincount(ids[:, i].ravel(), minlength=n_experts) for i in range(ids.shape[1])]
    )


def off_gpu(ids: np.ndarray, load: np.ndarray, n_resident: int) -> int:
    """Activations outside the n_resident experts of highest load; ties go to the lower id."""
    order = np.argsort(-load, axis=1, kind="stable")[:, :n_resident]
    resident = np.zeros(load.shape, dtype=bool)
    np.put_along_axis(resident, order, True, axis=1)
    layers = np.arange(load.shape[0])[None, :, None]
    return int((~resident[layers, ids]).sum())


def requests_of(trace: RoutingTrace, min_decode: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(prefill ids, decode ids) of every request with enough decode rows."""
    r = trace.requests
    for i in np.flatnonzero(r.n_decode >= min_decode):
        middle = r.start[i] + r.n_prompt[i]
        ids = trace.expert_ids
        yield ids[r.start[i] : middle].astype(np.int64), ids[middle : r.end[i]].astype(np.int64)


def test_mixtral_files_hold_ten_requests_each_found_by_sets(shared_traces):
    folder = shared_traces / "angerybob__HD-MoE/expert_trace/mixtral"
    for domain, n_tokens in TOKENS.items():
        ids = read_layers(open_source(folder / f"experts_{domain}_mixtral.json.gz"))
        starts = request_starts(ids).tolist()
        assert len(ids) == n_tokens
        assert len(starts) == 10
        if domain == "coding":
            assert starts == [0, 1387, 2970, 3981, 5507, 6313, 7478, 8436, 9876, 10895]
    assert sum(TOKENS.values()) == 87_828


def test_mixtral_segments_and_tokens(mixtral_trace):
    r = mixtral_trace.requests
    first_turn = r.context_offset == PREFIX
    assert len(r) == 80
    assert mixtral_trace.n_rows == 29_486
    assert int(r.length[first_turn].sum()) == 16_262
    assert int(r.length[~first_turn].sum()) == 13_224
    assert (int(r.length.min()), int(r.length.max())) == (64, 1058)
    assert r.n_conversations == 40
    long = r.n_decode >= 65
    assert (int((long & first_turn).sum()), int((long & ~first_turn).sum())) == (35, 29)
    assert int(r.n_decode[long].sum()) == 19_377
    assert int(r.n_prompt[long].sum()) == 8_192
    for split, n in (("train", 20), ("val", 10), ("test", 10)):
        chosen = r.conversation[r.split == ("train", "val", "test").index(split)]
        assert len(np.unique(chosen)) == n


@pytest.mark.parametrize(
    ("n_resident", "guided", "static"), [(4, 536_633, 566_058), (2, 863_584, 887_497)]
)
def test_mixtral_off_gpu_hits(mixtral_trace, n_resident, guided, static):
    parts = list(requests_of(mixtral_trace, 65))
    assert sum(len(decode) for _, decode in parts) * 32 == 620_064
    assert sum(off_gpu(d, counts(p, 8), n_resident) for p, d in parts) == guided
    pooled = sum(counts(d, 8) for _, d in parts)
    assert sum(off_gpu(d, pooled, n_resident) for _, d in parts) == static


@pytest.mark.parametrize(("capacity", "misses"), [(4, [232_694, 261_775]), (2, [381_455, 413_400])])
def test_mixtral_lru_misses_by_rank(mixtral_trace, capacity, misses):
    """The cache of validation.md §3 hobbit: tested before the token, then rank 1 most recent."""
    total = [0, 0]
    for prefill, decode in requests_of(mixtral_trace, 65):
        for layer in range(32):
            recent: list[int] = []
            rows = np.concatenate([prefill[:, layer], decode[:, layer]]).tolist()
            for number, (one, two) in enumerate(rows):
                if number >= len(prefill):
                    total[0] += one not in recent
                    total[1] += two not in recent
                recent = [e for e in recent if e not in (one, two)]
                recent = [*recent, two, one][-capacity:]
    assert total == misses


def test_deepseek_v2_lite_off_gpu_totals(shared_traces):
    trace = nvmoe(shared_traces, "dsv2lite")
    assert trace.n_rows == 1396
    assert trace.requests.start.tolist() == [0, 399, 798, 1197]
    assert trace.metadata.layer_ids == tuple(range(1, 27))
    parts = list(requests_of(trace, 1))
    assert sum(len(decode) for _, decode in parts) == 884
    whole = [np.concatenate(part) for part in parts]
    expected = {
        8: (102_049, 120_364, 95_542),
        16: (79_101, 101_549, 69_549),
        32: (44_447, 66_101, 33_201),
    }
    for k, totals in expected.items():
        prefix = sum(off_gpu(d, counts(p, 64), k) for p, d in parts)
        others = sum(
            off_gpu(d, sum(counts(w, 64) for j, w in enumerate(whole) if j != i), k)
            for i, (_, d) in enumerate(parts)
        )
        oracle = sum(off_gpu(d, counts(d, 64), k) for _, d in parts)
        assert (prefix, others, oracle) == totals


def test_gpt_oss_distinct_experts_in_closed_form(shared_traces):
    trace = nvmoe(shared_traces, "gptoss")
    assert (trace.n_rows, trace.n_layers) == (1396, 36)
    assert trace.metadata.layer_ids == tuple(range(36))
    share = counts(trace.expert_ids, 128) / trace.n_rows
    for batch, published in ((8, 20.6), (16, 32.3), (32, 47.8), (64, 65.2), (128, 81.8)):
        assert (1 - (1 - share) ** batch).sum(axis=1).mean() == pytest.approx(published, abs=0.1)


def nvmoe(folder: Path, name: str) -> RoutingTrace:
    return import_trace([folder / NVMOE / f"{name}-all.tokens.jsonl.gz"]).trace
