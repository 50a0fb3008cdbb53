"""`evaluate` against hand-computed rows, and the rules every table of results must keep."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

import ndp_gym
from ndp_gym.commands.evaluate import parse_policies
from ndp_gym.evaluation import evaluate
from ndp_gym.inputs import combinations
from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import PolicyContext
from ndp_gym.quality import QualityModel
from ndp_gym.rollout import train_profile
from tests.conftest import make_trace
from tests.toy import MODEL, PLENTY, SYSTEM
from tests.toy_evaluation import rows_of, toy_trace

PUBLIC_FIELDS = [
    "policy",
    "trace",
    "model",
    "system",
    "batch_size",
    "window",
    "n_conversations",
    "tokens_per_s",
    "tokens_per_s_ci95",
    "decode_step_p50_s",
    "decode_step_p99_s",
    "ttft_s",
    "load_s",
    "speedup_vs_all_far4",
    "speedup_vs_all_hbm",
    "delta_nll_nats",
    "accuracy_drop_points",
    "mean_bits",
    "hit_rate",
    "byte_hit_rate",
    "activation_bytes",
    "fetch_bytes",
    "migration_bytes",
    "wasted_bytes",
    "gpu_busy",
    "far_busy",
    "link_busy",
    "joules_per_token",
    "reward",
    "gates",
    "validity",
]


class Watcher:
    """All far, and remembers what it was told and shown."""

    def __init__(self, draws: int = 0) -> None:
        self.draws, self.contexts, self.seen = draws, [], 0

    def reset(self, context: PolicyContext) -> None:
        self.context = context
        self.contexts.append(context)

    def __call__(self, observation: Mapping[str, NDArray[np.float32]]) -> Plan:
        self.seen += 1
        self.shapes = {name: array.shape for name, array in observation.items()}
        drawn = [int(self.context.rng.integers(2)) for _ in range(self.draws)]
        bits = 4 if sum(drawn) % 2 == 0 else 8
        return all_far(self.context.model, self.context.system, bits)


class OracleWatcher(Watcher):
    """Counts the tokens of the coming window."""

    def __call__(self, observation: Mapping[str, NDArray[np.float32]]) -> Plan:
        assert self.context.future is not None
        self.last = self.context.future.next_counts()
        self.total = self.context.future.total_load
        return super().__call__(observation)


def test_all_far4_row_by_hand() -> None:
    """One request, two decode steps at contexts 100 and 101.

    Per layer (ms): attention .45025 and .45075; far 2 experts x 1, link .3, so 2.3 + attention.
    Outside: head 1, engine .5 + .1 per token. Steps: 2 x 2.75025 + 1.6 = 7.1005 and 7.1015.
    """
    row = rows_of([], toy_trace([3], context=98), batch_sizes=(1,), window=2, hbm_budget=0)[
        "all_far4"
    ]
    decode_s = 14.202e-3
    assert row["tokens_per_s"] == pytest.approx(2 / decode_s)
    assert row["decode_step_p50_s"] == pytest.approx(7.101e-3)
    assert row["decode_step_p99_s"] == pytest.approx(7.1005e-3 + 0.99e-6)
    assert row["delta_nll_nats"] == pytest.approx(3.0 * 0.01)  # kappa x rel_mse of 4 bit
    assert row["accuracy_drop_points"] == pytest.approx(19.0 * 0.03)
    assert (row["mean_bits"], row["hit_rate"], row["byte_hit_rate"]) == (4.0, 0.0, 0.0)
    assert row["activation_bytes"] == 2 * 2 * 200  # 2 tokens, 2 layers, both ways
    assert row["far_busy"] == pytest.approx(4 * 2e-3 / decode_s)
    assert row["link_busy"] == pytest.approx(4 * 0.3e-3 / decode_s)
    # the GPU waits 2.3 ms in each of 4 layers, and idles in the engine's 2 x .6 ms
    assert row["gpu_busy"] == pytest.approx((decode_s - 9.2e-3 - 1.2e-3) / decode_s)
    assert row["reward"] == pytest.approx(0.0)
    assert row["speedup_vs_all_far4"] == 1.0
    assert (row["n_tokens"], row["n_windows"], row["n_conversations"]) == (2, 1, 1)
    assert row["gates"] == "recorded"


def test_all_hbm_row_by_hand_and_the_speedups() -> None:
    """48 kB hold all eight experts at 8 bit (6 kB each).

    Layer: one launch .1 + two reads of .75, so 1.6 ms + attention; steps 2 x 2.05025 + 1.6.
    """
    rows = rows_of([], toy_trace([3], context=98), batch_sizes=(1,), window=2, hbm_budget=48_000)
    row, far = rows["all_hbm"], rows["all_far4"]
    decode_s = 2 * (2 * (1.6e-3 + 0.4505e-3) + 1.6e-3)
    assert row["tokens_per_s"] == pytest.approx(2 / decode_s)
    assert row["speedup_vs_all_far4"] == pytest.approx(14.202e-3 / decode_s)
    assert row["load_s"] == pytest.approx(48e-3)  # 48 kB at 1 MB/s, before the first token
    assert far["ttft_s"] is not None
    assert row["ttft_s"] == pytest.approx(far["ttft_s"] + 48e-3)
    assert (row["load_bytes"], row["migration_bytes"]) == (48_000, 0)
    assert (row["hit_rate"], row["byte_hit_rate"], row["mean_bits"]) == (1.0, 1.0, 8.0)
    best = max(rows["all_hbm"]["tokens_per_s"] or 0, rows["all_hbm_mixed"]["tokens_per_s"] or 0)
    assert far["speedup_vs_all_hbm"] == pytest.approx((far["tokens_per_s"] or 0) / best)
    assert "placement unnecessary here" in [
        *rows["all_hbm"]["notes"],
        *rows["all_hbm_mixed"]["notes"],
    ]


def test_too_small_a_budget_is_shown_as_infeasible_with_nulls() -> None:
    rows = rows_of([], toy_trace([3]), batch_sizes=(1,), hbm_budget=11_999)
    row = rows["all_hbm"]  # 8 experts x 1500 bytes at 2 bit = 12,000
    assert row["validity"] == "infeasible"
    assert row["validity_reasons"][0].startswith("all experts need 0.00 GB at 2 bit")
    assert row["tokens_per_s"] is row["speedup_vs_all_far4"] is row["reward"] is None
    assert rows["all_far4"]["speedup_vs_all_hbm"] is None
    assert rows["all_hbm_mixed"]["validity"] == "infeasible"
    assert rows_of([], toy_trace([3]), hbm_budget=12_000)["all_hbm"]["mean_bits"] == 2.0


def test_every_token_counts_once_whatever_the_batching() -> None:
    trace = make_trace(n_conversations=40)
    test = trace.split_requests("test")
    for scheduling in ("continuous", "static"):
        result = evaluate(
            [], trace, MODEL, SYSTEM, batch_sizes=(1, 3, 64), window=4, scheduling=scheduling
        )
        for row in result.rows:
            if row["tokens_per_s"] is not None:
                assert row["n_tokens"] == trace.requests.n_decode[test].sum()
                assert row["n_requests"] == len(test)
                assert row["n_conversations"] == 10


def test_policies_that_need_a_train_profile_are_not_applicable_without_one() -> None:
    row = rows_of(["static_popularity"], make_trace(n_conversations=15))["static_popularity"]
    assert row["validity"] == "n/a"
    assert "train" in row["validity_reasons"][0]
    assert row["tokens_per_s"] is None


def test_train_profile_counts_decode_tokens_of_the_train_split() -> None:
    trace = make_trace(n_conversations=20)
    profile = train_profile(trace)
    assert profile is not None
    expected = np.zeros((2, 4))
    n_tokens = 0
    for index in np.flatnonzero(trace.requests.split == 0):
        start, end = trace.requests.start[index], trace.requests.end[index]
        for row in range(start + trace.requests.n_prompt[index], end):
            n_tokens += 1
            for layer in range(2):
                expected[layer, trace.expert_ids[row, layer]] += 1
    assert profile == pytest.approx(expected / n_tokens)
    assert profile.sum(axis=1) == pytest.approx([2.0, 2.0])  # top-2


def test_only_oracles_are_given_the_future() -> None:
    trace = make_trace(n_conversations=20)
    honest, oracle = Watcher(), OracleWatcher()
    rows = rows_of([honest, oracle], trace, batch_sizes=(2,), window=4)
    assert honest.context.future is None
    assert oracle.last.shape == (4, 2, 4)
    assert oracle.total.sum() == rows["Watcher"]["n_tokens"] * 2 * 2  # layers x top-k
    assert rows["OracleWatcher"]["sees_future"]
    assert "sees the future; not an upper bound" in rows["OracleWatcher"]["notes"]
    assert not rows["Watcher"]["sees_future"]
    assert honest.shapes["tier"] == (2, 4)  # no lane axis
    assert honest.seen == rows["Watcher"]["n_windows"]


def test_policies_that_draw_run_once_per_seed_and_others_once() -> None:
    trace = make_trace(n_conversations=20)
    steady, random = Watcher(), Watcher(draws=1)
    random.name = "coin"  # type: ignore[attr-defined]
    rows = rows_of([steady, random], trace, batch_sizes=(2,), window=4, seeds=(3, 4, 5))
    assert (len(steady.contexts), rows["Watcher"]["seeds"]) == (1, [3])
    assert (len(random.contexts), rows["coin"]["seeds"]) == (3, [3, 4, 5])
    assert rows["coin"]["n_tokens"] == rows["Watcher"]["n_tokens"]  # per run
    assert 4.0 < (rows["coin"]["mean_bits"] or 0) < 8.0


def test_results_are_the_same_twice() -> None:
    def rows() -> list[dict[str, Any]]:
        trace = make_trace(n_conversations=20)
        found = evaluate(["random", "ema", "lru"], trace, MODEL, SYSTEM, window=4, seeds=(0, 1))
        return [{k: v for k, v in row.items() if k != "decision_ms"} for row in found]

    assert rows() == rows()


def test_max_windows_stops_early() -> None:
    row = rows_of([], make_trace(), batch_sizes=(2,), window=2, max_windows=3)["all_far4"]
    assert row["n_windows"] == 3
    assert row["n_tokens"] <= 3 * 2 * 2


def test_auto_budget_keeps_the_all_hbm_row_inside_the_smallest_budget() -> None:
    """42,000 B less 17,600 B dense leave 24 kB (all at 4 bit) only while contexts are short.

    At the end 350 tokens x 8 B of KV are taken away, so the row runs at 2 bit from the start:
    nothing moves and nothing is repaired.
    """
    system = replace(SYSTEM, gpu=replace(SYSTEM.gpu, memory_bytes=42_000))
    result = evaluate([], toy_trace([200, 150]), MODEL, system, batch_sizes=(2,), hbm_budget="auto")
    row = next(r for r in result.rows if r["policy"] == "all_hbm")
    assert row["hbm_budget_bytes"] is not None
    assert 42_000 - 17_600 - 2_800 <= row["hbm_budget_bytes"] < 24_000
    assert (row["mean_bits"], row["hit_rate"]) == (2.0, 1.0)
    assert (row["migration_bytes"], row["n_repaired"]) == (0, 0)


def test_the_machine_that_runs_may_differ_from_the_one_policies_are_told() -> None:
    """A link at half speed: activations take .5 instead of .3 ms in each of 4 layers."""
    link = replace(SYSTEM.link, bandwidth_bytes_per_s=0.5e6)
    slow = replace(SYSTEM, name="slow", link=link)
    watcher, trace = Watcher(), toy_trace([3], context=98)
    row = rows_of(
        [watcher], trace, batch_sizes=(1,), window=2, hbm_budget=0, actual_systems={"toy": slow}
    )["Watcher"]
    assert row["tokens_per_s"] == pytest.approx(2 / (14.202e-3 + 4 * 0.2e-3))
    assert row["link_busy"] == pytest.approx(4 * 0.5e-3 / 15.002e-3)
    assert watcher.context.system == SYSTEM
    assert "runs on slow; policies are told toy" in row["notes"]
    with pytest.raises(ValueError, match="name of its own"):
        rows_of([], trace, actual_systems={"toy": SYSTEM})


def test_rows_carry_all_public_fields_and_their_origin() -> None:
    trace = make_trace()
    result = evaluate([], trace, MODEL, SYSTEM, command="by hand")
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    row = document["rows"][0]
    assert [f for f in row if f in PUBLIC_FIELDS] == PUBLIC_FIELDS
    assert set(document["at_quality"][0]) >= {"policy", "delta_nll_budget", "tokens_per_s"}
    assert {e["delta_nll_budget"] for e in document["at_quality"]} == {0.01, 0.03, 0.1}
    spec = gymnasium.envs.registration.EnvSpec.from_json(row["env_spec"])
    assert (spec.id, spec.kwargs["batch_size"]) == ("NDPPlacement-v0", 8)
    assert row["trace_sha256"] == trace.sha256
    assert "numpy" in row["versions"]
    provenance = document["provenance"]
    assert provenance["command"] == "by hand"
    assert provenance["models"]["toy"]["hidden_size"] == 50
    assert provenance["systems"]["toy"]["link"]["latency_s"] == 0.05e-3
    assert provenance["traces"]["tiny"]["licence"] == "MIT"


def test_evaluating_leaves_the_defaults_of_the_environment_alone() -> None:
    evaluate([], make_trace(), MODEL, SYSTEM, batch_sizes=[1], split="test", max_windows=1)
    assert gymnasium.spec(ndp_gym.ENV_ID).kwargs == {}


def test_baselines_work_without_the_policies_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "policies", None)
    rows = rows_of(["all_far4", "all_hbm"], toy_trace([3]), hbm_budget=PLENTY)
    assert list(rows) == ["all_far4", "all_hbm", "all_hbm_mixed"]
    assert parse_policies("all") == ["all_far4", "all_hbm", "all_hbm_mixed"]
    with pytest.raises(ValueError, match="name it as module:attribute"):
        rows_of("lru", toy_trace([3]))


def test_unlike_inputs_are_refused() -> None:
    trace, other = toy_trace([3]), make_trace(n_experts=6)
    with pytest.raises(ValueError, match="distinct names, got Watcher twice"):
        rows_of([Watcher(), Watcher()], trace)
    with pytest.raises(ValueError, match="n_experts"):
        evaluate([], other, MODEL, SYSTEM)
    with pytest.raises(ValueError, match="none of the models toy, small has"):
        evaluate([], other, [MODEL, replace(MODEL, name="small", n_layers=3)], SYSTEM)
    with pytest.raises(ValueError, match="names no model preset"):
        evaluate([], trace, None, SYSTEM)
    slow = replace(SYSTEM, overlap=0.5)
    with pytest.raises(ValueError, match="two different 'toy'"):
        list(combinations(trace, MODEL, [SYSTEM, slow]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_sizes": 8}, "batch_sizes must be a list of whole numbers >= 1, got 8"),
        ({"batch_sizes": "8"}, "batch_sizes must be a list of whole numbers >= 1, got '8'"),
        ({"batch_sizes": (1, 2, 1)}, r"batch_sizes must be distinct, got \[1, 2, 1\]"),
        ({"batch_sizes": ()}, "batch_sizes must be .* at least one, got none"),
        ({"batch_sizes": (0,)}, "every one of batch_sizes must be a whole number >= 1, got 0"),
        ({"batch_sizes": (2.0,)}, "every one of batch_sizes must be a whole number >= 1, got 2.0"),
        ({"seeds": (3, 3)}, r"seeds must be distinct, got \[3, 3\]"),
        ({"seeds": ()}, "seeds must be .* at least one, got none"),
        ({"seeds": (-1,)}, "every one of seeds must be a whole number >= 0, got -1"),
        ({"max_windows": 0}, "max_windows must be a whole number >= 1, got 0"),
        ({"max_windows": True}, "max_windows must be a whole number >= 1, got True"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"uncertainty": -1}, "uncertainty must be a whole number >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_named(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of([], toy_trace([3]), **argument)


def test_the_error_model_stands_in_the_provenance() -> None:
    trace = toy_trace([3])
    plain = evaluate([], trace, MODEL, SYSTEM).provenance["quality"]
    assert plain == {"kappa": 3.0, "table_shape": None, "table_sha256": None}
    table = np.full((2, 4, 4), 0.01)
    facts = evaluate(
        [], trace, MODEL, SYSTEM, quality=QualityModel(kappa=2.5, table=table)
    ).provenance["quality"]
    assert (facts["kappa"], facts["table_shape"]) == (2.5, [2, 4, 4])
    assert facts["table_sha256"] == sha256(table.tobytes()).hexdigest()


def test_of_several_models_each_recording_takes_those_it_agrees_with() -> None:
    wide = replace(MODEL, name="wide", n_experts=6)
    pairs = combinations([toy_trace([3]), make_trace(n_experts=6)], [MODEL, wide], SYSTEM)
    assert [(p.label, p.model.name) for p in pairs] == [("toy", "toy"), ("tiny", "wide")]
