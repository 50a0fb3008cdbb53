"""A hand-made evaluation: four policies under one condition, with the numbers written down."""

from __future__ import annotations

from typing import Any

from ndp_gym.results import EvaluationResult, Row, at_quality


def sample_row(policy: str, **changes: Any) -> Row:
    """A plausible row of ``policy``; ``changes`` replace fields."""
    row = Row(
        policy=policy,
        trace="bundled",
        model="tiny-moe",
        system="h100_cxl",
        batch_size=8,
        window=16,
        n_conversations=20,
        tokens_per_s=100.0,
        tokens_per_s_ci95=(90.0, 112.0),
        decode_step_p50_s=0.08,
        decode_step_p99_s=0.1,
        ttft_s=1.5,
        load_s=0.25,
        speedup_vs_all_far4=1.0,
        speedup_vs_all_far4_ci95=(1.0, 1.0),
        speedup_vs_all_hbm=0.5,
        speedup_vs_all_hbm_ci95=(0.45, 0.55),
        delta_nll_nats=0.026,
        delta_nll_nats_ci95=(0.025, 0.027),
        accuracy_drop_points=0.49,
        mean_bits=4.0,
        hit_rate=0.0,
        byte_hit_rate=0.0,
        activation_bytes=1000,
        fetch_bytes=0,
        migration_bytes=0,
        wasted_bytes=0,
        load_bytes=0,
        gpu_busy=0.25,
        far_busy=0.7,
        link_busy=0.05,
        joules_per_token=2.5,
        reward=0.0,
        reward_throughput=0.0,
        reward_quality=0.0,
        reward_bound=None,
        regret=None,
        reward_bound_any_service=None,
        n_repaired=0,
        requantise_s=0.0,
        decision_ms=0.12,
        gates="recorded",
        validity="in_range",
        validity_reasons=[],
        notes=[],
        sees_future=False,
        split="test",
        scheduling="continuous",
        hbm_budget_bytes=10**9,
        quality_weight=4.0,
        n_requests=40,
        n_windows=12,
        n_tokens=1500,
        seeds=[0],
        order_flips_with=None,
        commit="0" * 40,
        env_id="NDPPlacement-v0",
        env_spec='{"id": "NDPPlacement-v0"}',
        trace_sha256="f" * 64,
        versions="ndp-gym 0.1.0; numpy 2.4.6",
    )
    row.update(changes)  # type: ignore[typeddict-item]
    return row


def infeasible_row(policy: str) -> Row:
    """A row of which nothing could be run."""
    keep = ("policy", "trace", "model", "system", "batch_size", "window")
    nulls = {
        key: None
        for key, value in sample_row(policy).items()
        if key not in keep and isinstance(value, float | tuple)
    }
    return sample_row(
        policy, **nulls, validity="infeasible", validity_reasons=["needs 12.0 GB, budget 8.0 GB"]
    )


def sample_result(**provenance: Any) -> EvaluationResult:
    """All four rows and what follows from them."""
    rows = [
        sample_row("all_far4"),
        sample_row(
            "all_far2",
            tokens_per_s=180.0,
            tokens_per_s_ci95=(170.0, 195.0),
            speedup_vs_all_far4=1.8,
            delta_nll_nats=0.34,
            mean_bits=2.0,
            reward=-0.67,
            validity="extrapolated",
            validity_reasons=["mean bits <= 2: recorded routing does not react to quantization"],
        ),
        sample_row(
            "cost_aware", tokens_per_s=150.0, delta_nll_nats=0.02, hit_rate=0.4, reward=0.43
        ),
        infeasible_row("all_hbm"),
    ]
    return EvaluationResult(
        rows=rows, at_quality=at_quality(rows), provenance={"command": "test", **provenance}
    )
