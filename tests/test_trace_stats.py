"""Statistics by hand, and against the published tables of the public recordings."""

import numpy as np
import pytest

from ndp_gym.importers import ImportOptions, import_trace
from ndp_gym.trace_loops import loop_free_rows, looped_rows
from ndp_gym.trace_stats import (
    chance_overlap,
    entropy_share,
    lag_overlap,
    multi_hot,
    spearman,
    top_share,
    trace_statistics,
    window_coverage,
    zipf_exponent,
)

NVMOE = "BrianBoitano__nvmoe/traces"
NF4 = "pjordanandrsn__grouped-nf4-gemm/bench/cold-engine/routing-trace"
GEMMA = "Helldez__BigMoeOnEdge/docs/bench-data/2026-07-15-route-trace/gemma.route.csv.gz"


def test_zipf_exponent_recovers_the_law_it_was_drawn_from():
    rank = np.arange(1, 65)
    for exponent in (0.0, 0.5, 1.0, 2.0):
        assert zipf_exponent(1e6 * rank**-exponent)[()] == pytest.approx(exponent, abs=1e-6)


def test_popularity_by_hand():
    counts = np.array([[3.0, 1.0, 0.0, 0.0]])
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert entropy_share(counts)[0] == pytest.approx(expected)
    assert top_share(counts)[0] == 0.75
    assert chance_overlap(counts, 4)[0] == pytest.approx(0.75**2 + 0.25**2)


def test_overlap_and_coverage_by_hand():
    hot = multi_hot(np.array([[[0, 1]], [[1, 2]], [[0, 3]], [[0, 1]]]), 4)
    assert lag_overlap(hot, 1).ravel().tolist() == [0.5, 0.0, 0.5]
    assert lag_overlap(hot, 3).ravel().tolist() == [1.0]
    assert lag_overlap(hot, 9).shape == (0, 1)
    assert window_coverage(hot, 2).ravel().tolist() == [0.75, 0.75]


def test_spearman_takes_ties_at_their_mean_rank():
    a, b = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    # ranks 0 1.5 1.5 3 and 0 2 1 3: covariance 4.5, variances 4.5 and 5
    assert spearman(a, b)[()] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(a, np.ones(4))[()] == 0


def test_a_period_is_found_and_random_routing_is_not_one():
    rng = np.random.default_rng(0)
    text = np.argsort(rng.random((200, 3, 16)), axis=2)[:, :, :4]
    assert not looped_rows(text).any()
    looped = np.concatenate([text[:60], np.tile(text[60:67], (20, 1, 1))])
    assert 60 <= loop_free_rows(looped) <= 67
    assert loop_free_rows(np.tile(text[:2], (50, 1, 1))) == 1


def test_statistics_of_a_tiny_trace_are_finite_by_phase(tiny_trace):
    for phase in ("all", "prefill", "decode"):
        s = trace_statistics(tiny_trace, phase)
        assert s.n_requests == len(tiny_trace.requests)
        assert np.isfinite([s.zipf, s.entropy, s.chance, s.max_over_mean]).all()
        assert s.overlap[64] is None  # requests have at most 27 rows
        assert s.coverage[64] is None
    with pytest.raises(ValueError, match="phase must be one of"):
        trace_statistics(tiny_trace, "train")


def test_statistics_are_deterministic(tiny_trace):
    assert trace_statistics(tiny_trace, seed=3) == trace_statistics(tiny_trace, seed=3)


# Computed by other code from the same files; the last digit plus one, shuffled controls .01
PUBLISHED = {
    "dsv2lite": {
        "zipf": 0.32, "entropy": 0.983, "entropy_request": 0.948, "top10_share": 0.166,
        "max_over_mean": 2.4, "lags": (0.242, 0.189, 0.159, 0.159, 0.146, 0.150),
        "layers": (0.13, 0.33), "chance": 0.108, "chance_request": 0.142,
        "coverage": (0.641, 0.813, 0.920), "shuffled": (0.704, 0.865, 0.950),
    },
    "olmoe": {
        "zipf": 0.54, "entropy": 0.948, "entropy_request": 0.876, "top10_share": 0.248,
        "max_over_mean": 3.9, "lags": (0.416, 0.345, 0.318, 0.329, 0.309, 0.321),
        "layers": (0.26, 0.51), "chance": 0.188, "chance_request": 0.302,
        "coverage": (0.592, 0.719, 0.816), "shuffled": (0.661, 0.783, 0.868),
    },
    "gptoss": {
        "zipf": 0.99, "entropy": 0.777, "entropy_request": 0.670, "top10_share": 0.585,
        "max_over_mean": 14.8, "lags": (0.505, 0.454, 0.434, 0.395, 0.362, 0.328),
        "layers": (0.36, 0.66), "chance": 0.186, "chance_request": 0.298,
        "coverage": (0.155, 0.222, 0.299), "shuffled": (0.195, 0.267, 0.343),
    },
    "mixtral": {
        "zipf": 0.13, "entropy": 0.996, "entropy_request": 0.978, "top10_share": 0.144,
        "max_over_mean": 1.15, "lags": (0.356, 0.303, 0.288, 0.279, 0.277, 0.275),
        "layers": (0.28, 0.44), "chance": 0.253, "chance_request": 0.273,
        "coverage": (0.950, 0.990, 0.997), "shuffled": (0.975, 0.997, 1.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table_is_reproduced(shared_traces, request, name):
    if name == "mixtral":
        trace = request.getfixturevalue("mixtral_trace")
    else:
        trace = import_trace([shared_traces / NVMOE / f"{name}-all.tokens.jsonl.gz"]).trace
    s, row = trace_statistics(trace, loops=False), PUBLISHED[name]
    assert s.overlap_layers == pytest.approx(row["layers"], abs=0.01)
    assert s.zipf == pytest.approx(row["zipf"], abs=0.01)
    assert s.max_over_mean == pytest.approx(row["max_over_mean"], abs=0.1)
    for key in ("entropy", "top10_share", "chance"):
        assert getattr(s, key) == pytest.approx(row[key], abs=0.0015), key
    # pooled somewhat differently for Mixtral there (by length)
    tolerance = 0.003 if name == "mixtral" else 0.0015
    for key in ("entropy_request", "chance_request"):
        assert getattr(s, key) == pytest.approx(row[key], abs=tolerance), key
    assert list(s.overlap.values()) == pytest.approx(row["lags"], abs=tolerance)
    assert list(s.coverage.values()) == pytest.approx(row["coverage"], abs=tolerance)
    assert list(s.coverage_shuffled.values()) == pytest.approx(row["shuffled"], abs=0.01)


def test_published_gemma_rows(shared_traces):
    """Decode of one request with gate weights (Gemma-4)."""
    trace = import_trace([shared_traces / GEMMA]).trace
    s = trace_statistics(trace, "decode")
    assert s.overlap[1] == pytest.approx(0.357, abs=0.0015)
    assert s.coverage[16] == pytest.approx(0.270, abs=0.0015)
    assert s.looped_share == 0
    assert (s.prefill_cosine, s.prefill_spearman) == pytest.approx((0.722, 0.54), abs=0.006)
    profile = (0.312, 0.200, 0.153, 0.127, 0.110, 0.098)
    assert s.gate_profile == pytest.approx(profile, abs=0.001)


def test_published_similarities(shared_traces):
    """First 64 tokens against the rest, and pairs of requests."""
    path = shared_traces / NVMOE / "dsv2lite-all.tokens.jsonl.gz"
    s = trace_statistics(import_trace([path], options=ImportOptions(n_prompt=(64,))).trace)
    assert (s.prefill_cosine, s.prefill_spearman) == pytest.approx((0.884, 0.572), abs=0.01)
    assert s.next_layer_recall == pytest.approx(0.49, abs=0.03)
    assert s.next_layer_popularity == pytest.approx(0.16, abs=0.02)
    path = shared_traces / NVMOE / "olmoe-all.tokens.jsonl.gz"
    s = trace_statistics(import_trace([path], options=ImportOptions(n_prompt=(64,))).trace)
    assert (s.prefill_cosine, s.prefill_spearman) == pytest.approx((0.854, 0.620), abs=0.01)
    assert (s.request_cosine, s.request_spearman) == pytest.approx((0.456, 0.066), abs=0.01)


# Loop-free prefix in steps, looped share
LOOPS = {
    "qwen_prose": (512, 0.00),
    "qwen_code": (52, 0.85),
    "qwen_math": (23, 0.89),
    "qwen_dialogue": (52, 0.74),
    "granite_prose": (229, 0.09),
    "granite_code": (189, 0.02),
    "granite_math": (104, 0.39),
    "granite_dialogue": (44, 0.87),
}


@pytest.mark.parametrize("name", LOOPS)
def test_published_loops(shared_traces, name):
    path = shared_traces / NF4 / f"{name}.jsonl.gz"
    ids = import_trace([path], options=ImportOptions(keep_loops=True)).trace.expert_ids
    steps, share = LOOPS[name]
    assert loop_free_rows(ids) == steps
    assert looped_rows(ids).mean() == pytest.approx(share, abs=0.006)
