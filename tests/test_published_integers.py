"""Integers of the public recordings, counted before this code was written."""

import numpy as np
import pytest

from ndp_gym.importers import import_trace
from ndp_gym.importers.hdmoe import PREFIX, read_layers, request_starts
from ndp_gym.importers.source import open_source
from ndp_gym.validation.hits import Part, counts, lru_misses, off_gpu, parts_of, top_experts

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
    ("n_resident", "guided", "static", "lru"),
    [
        (4, 536_633, 566_058, [232_694, 261_775]),
        (2, 863_584, 887_497, [381_455, 413_400]),
    ],
)
def test_mixtral_hits_and_misses(recordings, n_resident, guided, static, lru):
    found = recordings.mixtral_hits[n_resident]
    assert found.guided.size == found.static.size == 620_064
    assert (found.guided.sum(), found.static.sum()) == (guided, static)
    assert [round(share * 620_064) for share in found.lru_miss] == lru


def test_lru_by_hand():
    """Both ids are tested before either is moved; rank 1 ends as the most recent."""
    trace = [[[0, 1]], [[2, 0]], [[1, 0]], [[0, 2]]]
    part = (np.array(trace[:1]), np.array(trace[1:]))
    # after prefill [1, 0]; (2, 0): rank 1 misses -> [0, 2]; (1, 0): rank 1 misses -> [0, 1];
    # (0, 2): rank 2 misses

    assert lru_misses([Part(*part)], 2) == (2, 1)


def test_deepseek_v2_lite_off_gpu_totals(shared_traces):
    file = shared_traces / "BrianBoitano__nvmoe/traces/dsv2lite-all.tokens.jsonl.gz"
    trace = import_trace([file]).trace
    assert trace.n_rows == 1396
    assert trace.requests.start.tolist() == [0, 399, 798, 1197]
    assert trace.metadata.layer_ids == tuple(range(1, 27))
    parts = parts_of(trace, 1)
    assert sum(len(part.decode) for part in parts) == 884
    whole = [np.concatenate(part) for part in parts]
    expected = {
        8: (102_049, 120_364, 95_542),
        16: (79_101, 101_549, 69_549),
        32: (44_447, 66_101, 33_201),
    }

    def missed(ids: np.ndarray, load: np.ndarray, n_resident: int) -> int:
        return int(off_gpu(ids, top_experts(load, n_resident)).sum())

    for k, totals in expected.items():
        prefix = sum(missed(p.decode, counts(p.prefill, 64), k) for p in parts)
        others = sum(
            missed(p.decode, sum(counts(w, 64) for j, w in enumerate(whole) if j != i), k)
            for i, p in enumerate(parts)
        )
        oracle = sum(missed(p.decode, counts(p.decode, 64), k) for p in parts)
        assert (prefix, others, oracle) == totals


def test_gpt_oss_distinct_experts_in_closed_form(recordings):
    trace = recordings.gpt_oss_trace
    assert (trace.n_rows, trace.n_layers) == (1396, 36)
    assert trace.metadata.layer_ids == tuple(range(36))
    for batch, published in ((8, 20.6), (16, 32.3), (32, 47.8), (64, 65.2), (128, 81.8)):
        assert recordings.gpt_oss_distinct(batch) == pytest.approx(published, abs=0.1)
