"""What a row says of its run: intervals, shares of bytes, doubts and notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from ndp_gym.commands.evaluate import parse_policies
from ndp_gym.contenders import all_far4
from ndp_gym.evaluation import evaluate
from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import PolicyContext
from ndp_gym.quality import QualityModel
from ndp_gym.rollout import run_policy
from ndp_gym.specs import Prefetch, Service
from ndp_gym.trace import RoutingTrace
from tests.conftest import make_trace
from tests.toy import MODEL, PLENTY, SYSTEM
from tests.toy_evaluation import rows_of, task_of, toy_trace


class Fetching:
    """All experts fetched at 4 bit when they are needed, by one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def reset(self, context: PolicyContext) -> None:
        self.plan = replace(all_far(context.model, context.system, 4), service=self.service)

    def __call__(self, observation: Mapping[str, NDArray[np.float32]]) -> Plan:
        return self.plan


def test_byte_hit_rate_leaves_out_what_a_prefetch_copied_in_vain() -> None:
    """Nothing is kept, so every byte read was fetched: a third of them in vain, and no hits."""
    rates = {}
    for name, precision in (("exact", 1.0), ("loose", 0.5)):
        service = Service(kind="fetch", prefetch=Prefetch(recall=0.5, precision=precision, depth=1))
        rates[name] = Fetching(service)
        rates[name].name = name  # type: ignore[attr-defined]
    rows = rows_of(list(rates.values()), toy_trace([9]), batch_sizes=(1,), hbm_budget=0)
    exact, loose = rows["exact"], rows["loose"]
    assert (loose["fetch_bytes"] or 0) == 1.5 * (exact["fetch_bytes"] or 0)
    assert (exact["hit_rate"], exact["byte_hit_rate"]) == (0.0, 0.0)
    assert (loose["hit_rate"], loose["byte_hit_rate"]) == (0.0, 0.0)


@pytest.mark.parametrize("system", ["h100_fetch", "h100_cxl_pnm"])
def test_shares_of_bytes_lie_between_nought_and_one_for_every_policy(system: str) -> None:
    names = parse_policies("all")
    result = evaluate(names, systems=system, hbm_budget=0.01, max_windows=4)
    measured = [row for row in result.rows if row["byte_hit_rate"] is not None]
    assert len(measured) > 10
    for row in measured:
        assert 0.0 <= (row["byte_hit_rate"] or 0.0) <= 1.0, row["policy"]
        if row["hit_rate"] == 0.0:  # up to a byte per layer and step
            assert row["byte_hit_rate"] == pytest.approx(0.0, abs=1e-6), row["policy"]


def test_low_bits_and_large_loss_are_flagged() -> None:
    rows = {r["policy"]: r for r in evaluate(["all_far2", "all_far:bits=1"], max_windows=1).rows}
    assert rows["all_far2"]["validity"] == "in_range"
    assert rows["all_far:bits=1"]["validity"] == "extrapolated"
    assert rows["all_far:bits=1"]["validity_reasons"] == [
        "mean bits <= 1.5: recorded routing does not react to quantization"
    ]
    coarse = replace(SYSTEM.format, rel_mse={16: 0.0, 8: 0.0, 4: 0.6, 2: 0.7})
    bad = evaluate([], toy_trace([3]), MODEL, replace(SYSTEM, format=coarse), hbm_budget=0).rows[0]
    assert bad["validity_reasons"] == ["ΔNLL > 1.5 nats: outside the quality model"]
    assert bad["delta_nll_nats"] == pytest.approx(1.8)  # flagged, not clamped


def test_seed_ndp_is_extrapolated_beyond_batch_twelve() -> None:
    seed = replace(SYSTEM, far=replace(SYSTEM.far, name="seed_ndp"))
    result = evaluate([], toy_trace([3] * 3), MODEL, seed, batch_sizes=(12, 13), hbm_budget=0)
    assert [r["validity"] for r in result.rows if r["policy"] == "all_far4"] == [
        "in_range",
        "extrapolated",
    ]


def test_the_default_kappa_is_marked_with_another_format_than_it_was_fitted_with() -> None:
    other = replace(SYSTEM, format=replace(SYSTEM.format, name="rtn_g128"))
    trace = toy_trace([3])
    plain, marked, chosen = (
        evaluate([], trace, MODEL, system, quality=quality).rows[0]
        for system, quality in ((SYSTEM, None), (other, None), (other, QualityModel(kappa=2.4)))
    )
    assert (plain["validity"], chosen["validity"]) == ("in_range", "in_range")
    assert marked["validity"] == "extrapolated"
    assert marked["validity_reasons"] == [
        "kappa 3 of ΔNLL was fitted with mse_g128, not rtn_g128",
    ]


def test_window_seconds_go_to_conversations_by_their_tokens() -> None:
    """Two slots decode 3 and 1 tokens in one window of 4 steps; then nothing is left."""
    measured = run_policy(all_far4().make(), task_of(toy_trace([4, 2]), batch_size=2), seed=0)
    assert measured.tokens.tolist() == [3.0, 1.0]
    assert measured.seconds == pytest.approx(measured.totals["decode_s"] * np.array([0.75, 0.25]))
    assert len(measured.step_s[0]) == 3  # the fourth step decoded nothing
    assert measured.ttft_s[1] > measured.ttft_s[0]  # prefills run one after the other


def test_intervals_need_sixteen_conversations_in_the_recording() -> None:
    few = rows_of([], make_trace(n_conversations=15), batch_sizes=(2,), hbm_budget=PLENTY)
    assert few["all_far4"]["tokens_per_s_ci95"] is None
    assert few["all_hbm"]["speedup_vs_all_far4_ci95"] is None
    assert few["all_far4"]["notes"][-1] == (
        "no intervals: they need 16 conversations, the recording has 15 (blocks of 2 in the run: 8)"
    )
    many = rows_of(
        ["all_far2"], make_trace(n_conversations=80), batch_sizes=(1,), hbm_budget=PLENTY
    )
    assert not any("intervals" in note for note in many["all_far2"]["notes"])
    low, high = many["all_far2"]["tokens_per_s_ci95"] or (0, 0)
    assert low < (many["all_far2"]["tokens_per_s"] or 0) < high
    assert many["all_far4"]["speedup_vs_all_far4_ci95"] == pytest.approx((1.0, 1.0))
    low, high = many["all_far2"]["speedup_vs_all_far4_ci95"] or (0, 0)
    wide = np.diff(many["all_far2"]["tokens_per_s_ci95"] or (0, 0))[0]
    assert (high - low) / high < 0.3 * wide / (many["all_far2"]["tokens_per_s"] or 1)  # paired


def test_intervals_need_eight_blocks_of_conversations_that_decoded_together() -> None:
    """80 conversations, 20 of them in test: 20, 10 and 3 blocks."""
    result = evaluate([], make_trace(n_conversations=80), MODEL, SYSTEM, batch_sizes=(1, 2, 8))
    one, two, eight = (row for row in result.rows if row["policy"] == "all_far4")
    assert (one["n_conversations"], one["notes"]) == (20, [])
    assert two["tokens_per_s_ci95"] is not None
    assert two["notes"] == ["intervals from 10 blocks of conversations: somewhat too narrow"]
    assert eight["tokens_per_s_ci95"] is eight["speedup_vs_all_far4_ci95"] is None
    assert eight["delta_nll_nats_ci95"] is None
    assert eight["notes"] == ["no intervals: they need 8 blocks of 8 conversations, the run has 3"]


def test_conversations_are_summed_in_order_of_first_admission() -> None:
    """Ids 7 and 3: the first request run belongs to 7."""
    trace = toy_trace([4, 2, 3])
    requests = replace(trace.requests, conversation=np.array([7, 3, 7]))
    again = RoutingTrace(trace.expert_ids, trace.gate_weights, requests, trace.metadata)
    measured = run_policy(all_far4().make(), task_of(again, batch_size=1), seed=0)
    assert measured.tokens.tolist() == [3.0 + 2.0, 1.0]


def test_notes_say_what_the_recording_lacks() -> None:
    trace = toy_trace([3], phases="first 128 tokens taken as prefill")
    bare = RoutingTrace(trace.expert_ids, None, trace.requests, trace.metadata)
    row = rows_of([], bare)["all_far4"]
    assert row["gates"] == "rank profile of toy"
    assert row["notes"] == [
        "gate weights not recorded: rank profile of toy",
        "first 128 tokens taken as prefill",
        "only 1 requests for 8 slots: the others idle",
        "no intervals: they need 16 conversations, the recording has 1 (blocks of 8 in the run: 1)",
    ]
