"""Sums of an outcome against what their names define, for lanes on different systems."""

from dataclasses import fields, replace

import numpy as np

from ndp_gym.cost import decode_energy, dense_read_bytes
from ndp_gym.cost.decode import expert_flops
from ndp_gym.lanes import Lanes
from ndp_gym.outcome import Outcome
from ndp_gym.quality import SUPER_EXPERT_NATS, delta_nll
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace()
GUARDED = replace(MODEL, super_experts=((0, 1), (1, 3)))
SLOWER = replace(SYSTEM, name="slower", gpu=replace(SYSTEM.gpu, bandwidth_bytes_per_s=4e6))


def outcomes() -> list[Outcome]:
    """Three lanes, the second on a slower machine; experts at random tiers and widths."""
    lanes = Lanes(TRACE, GUARDED, SYSTEM, n_lanes=3, batch_size=3, window=4, hbm_budget=30_000)
    order = TRACE.split_requests("train")
    for lane in range(3):
        slower = replace(lanes.base, actual=SLOWER) if lane == 1 else None
        lanes.reset(lane, np.roll(order, lane), slower)
    rng = np.random.default_rng(0)
    shape = (3, *lanes.shape)
    return [
        lanes.advance(
            rng.integers(0, 2, shape).astype(np.uint8),
            rng.choice(np.array(SYSTEM.stored_bits, np.uint8), shape),
        )
        for _ in range(5)
    ]


def test_totals_are_the_sums_over_steps_and_layers() -> None:
    for o in outcomes():
        np.testing.assert_array_equal(o.tokens, o.step_tokens.sum(axis=1))
        np.testing.assert_array_equal(o.routed, o.layer_routed.sum(axis=1))
        np.testing.assert_array_equal(o.hits, o.layer_hits.sum(axis=1))
        np.testing.assert_array_equal(o.routed, o.tokens * MODEL.n_layers * MODEL.top_k)
        np.testing.assert_array_equal(o.counts.sum(axis=2), o.layer_routed)
        np.testing.assert_allclose(o.decode_s, o.step_s.sum(axis=1), rtol=1e-14)


def test_loss_is_that_of_the_quality_model() -> None:
    for o in outcomes():
        reference = delta_nll(GUARDED, o.ref_layer_error, o.layer_energy)
        np.testing.assert_allclose(o.ref_delta_nll, reference, rtol=1e-13)
        guard = o.delta_nll - delta_nll(GUARDED, o.layer_error, o.layer_energy)
        assert (guard > -1e-12).all()
        assert (guard < SUPER_EXPERT_NATS + 1e-12).all()
    assert any((o.delta_nll > 0.4).any() for o in outcomes())  # the guard was at work


def test_energy_is_what_the_cost_functions_charge() -> None:
    n_layers = MODEL.n_all_layers
    outside = MODEL.active_params - MODEL.n_layers * MODEL.top_k * MODEL.expert_params
    lanes = Lanes(TRACE, MODEL, SYSTEM, batch_size=1, window=4, hbm_budget=30_000)
    lanes.reset(0, np.array([0]))
    context = int(lanes.schedule.context[0, 0])
    tier = np.array([[[0, 1, 0, 1], [1, 0, 1, 0]]], np.uint8)
    o = lanes.advance(tier, np.full((1, 2, 4), 4, np.uint8)).lane(0)
    kv_tokens = sum(context + step + 1 for step in range(4)) * n_layers
    served = o.served_tokens.sum(axis=1)
    parts = decode_energy(
        SYSTEM,
        seconds=float(o.decode_s),
        hbm_bytes=float(o.hbm_weight_bytes)
        + 4 * dense_read_bytes(MODEL)
        + kv_tokens * MODEL.kv_bytes_per_token_layer,
        far_bytes=float(o.far_weight_bytes),
        link_bytes=float(o.activation_bytes + o.fetch_bytes + o.migration_bytes),
        gpu_flops=float(served[0]) * expert_flops(MODEL) + 4 * 2 * outside,
        far_flops=float(served[1]) * expert_flops(MODEL),
    )
    np.testing.assert_allclose(o.energy_j, parts.total_j, rtol=1e-12)


def test_lanes_do_not_disturb_each_other() -> None:
    """One lane of three gives what it gives alone, to the last bit."""
    together = outcomes()
    alone = Lanes(TRACE, GUARDED, SYSTEM, batch_size=3, window=4, hbm_budget=30_000)
    alone.reset(0, np.roll(TRACE.split_requests("train"), 1), replace(alone.base, actual=SLOWER))
    rng = np.random.default_rng(0)
    shape = (3, *alone.shape)
    for o in together:
        tier = rng.integers(0, 2, shape).astype(np.uint8)
        bits = rng.choice(np.array(SYSTEM.stored_bits, np.uint8), shape)
        single = alone.advance(tier[1:2], bits[1:2]).lane(0)
        for field in fields(Outcome):
            np.testing.assert_array_equal(
                getattr(single, field.name), getattr(o.lane(1), field.name), err_msg=field.name
            )
