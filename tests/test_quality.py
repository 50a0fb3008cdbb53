import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndp_gym import presets
from ndp_gym.quality import (
    SUPER_EXPERT_NATS,
    QualityModel,
    accuracy_drop_points,
    delta_nll,
    layer_weights,
    perplexity,
    rel_mse_table,
)
from ndp_gym.validation import quality as published

MIXTRAL = presets.model("mixtral-8x7b")
SEED = presets.system("seed_sim")
EPS = presets.fmt("mse_g128").rel_mse


# Energy shares at 1/2/3 bit of the bit maps PMQ 2.54/2.05/1.57 (Aaronhuang-778/MC-MoE) and GEMQ
# 2.5/1.5 bit (jndeng/GEMQ), flat layer weights; those of the default weights are published.MIXED.
FLAT = [
    (0.099, 0.248, 0.653),
    (0.338, 0.264, 0.398),
    (0.599, 0.259, 0.142),
    (0.178, 0.124, 0.698),
    (0.654, 0.177, 0.169),
]
PUBLISHED = (5.09, 5.91, 8.50, 5.03, 7.93)


@pytest.mark.parametrize(
    ("masses", "kappa", "predicted", "tolerance"),
    [
        (published.MIXED.values(), 3.0, (4.96, 6.30, 8.15, 5.07, 8.01), 0.40),
        (FLAT, 2.91, (4.93, 6.21, 7.94, 5.16, 8.21), 0.565),
    ],
)
def test_mixed_precision_mixtral_perplexities(masses, kappa, predicted, tolerance):
    fmt = presets.fmt("mse_g128")
    for mass, ours, measured in zip(masses, predicted, PUBLISHED, strict=True):
        loss = published.loss_of_error(published.Masses(*mass).error(fmt), kappa)
        ppl = float(perplexity(3.84, loss))
        assert ppl == pytest.approx(ours, abs=0.03)  # shares are printed to three digits
        assert ppl == pytest.approx(measured, abs=tolerance)


def test_layer_weights_are_u_shaped_unless_given():
    weights = layer_weights(MIXTRAL)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0] == weights[3] == weights[-2] == pytest.approx(2 / 38)
    assert weights[4] == weights[-3] == pytest.approx(1 / 38)
    given_weights = dataclasses.replace(MIXTRAL, layer_weights=tuple(range(1, 33)))
    assert layer_weights(given_weights)[1] == pytest.approx(2 / (32 * 33 / 2))


def test_16_bit_loses_nothing_and_every_bit_helps():
    losses = [
        float(delta_nll(MIXTRAL, np.full(32, EPS[bits]), np.ones(32))) for bits in sorted(EPS)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


@given(
    low=st.sampled_from((1, 2, 3, 4)),
    shares=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
)
def test_moving_bits_to_the_expert_with_more_energy_never_hurts(low, shares):
    cold, hot = sorted(shares)
    energy = np.full(32, cold + hot)
    wide_on_hot = np.full(32, cold * EPS[low] + hot * EPS[8])
    wide_on_cold = np.full(32, cold * EPS[8] + hot * EPS[low])
    good = delta_nll(MIXTRAL, wide_on_hot, energy)
    assert good <= delta_nll(MIXTRAL, wide_on_cold, energy) + 1e-12


def test_super_experts_at_two_bits_cost_the_guard():
    plain = delta_nll(MIXTRAL, np.zeros(32), np.ones(32))
    guarded = delta_nll(MIXTRAL, np.zeros(32), np.ones(32), 0.5)
    assert float(guarded - plain) == pytest.approx(SUPER_EXPERT_NATS / 2)


def test_layers_without_traffic_lose_nothing_and_lanes_broadcast():
    energy = np.zeros((2, 32))
    energy[1] = 2.0
    loss = delta_nll(MIXTRAL, energy * EPS[3], energy, np.array([0.0, 0.0]))
    np.testing.assert_allclose(loss, [0.0, 3.0 * EPS[3]])


def test_a_measured_table_replaces_the_format():
    shape = (32, 8, len(SEED.stored_bits))
    measured = np.full(shape, 0.25)
    assert rel_mse_table(MIXTRAL, SEED).shape == shape
    np.testing.assert_allclose(
        rel_mse_table(MIXTRAL, SEED)[5, 3], [0, 0.0088, 0.0334, 0.1146, 0.361]
    )
    table = rel_mse_table(MIXTRAL, SEED, QualityModel(table=measured))
    np.testing.assert_array_equal(table, measured)
    with pytest.raises(ValueError, match=r"shape \[L, E, NB\] = \(32, 8, 5\), got \(1, 1, 1\)"):
        rel_mse_table(MIXTRAL, SEED, QualityModel(table=np.ones((1, 1, 1))))


def test_broken_quality_models_are_refused():
    with pytest.raises(ValueError, match="kappa must be finite and > 0, got 0"):
        QualityModel(0.0)
    with pytest.raises(ValueError, match="3 axes"):
        QualityModel(table=np.ones(3))
    with pytest.raises(ValueError, match="finite relative errors"):
        QualityModel(table=np.full((1, 1, 1), np.nan))


def test_quality_models_compare_by_value_so_that_caches_hit():
    table = np.ones((1, 1, 1))
    assert QualityModel() == QualityModel(3.0)
    assert hash(QualityModel()) == hash(QualityModel(3.0))
    assert QualityModel(table=table) == QualityModel(table=table)
    assert QualityModel(table=table) != QualityModel(table=table.copy())


def test_perplexity_and_accuracy_points():
    assert float(perplexity(3.84, 0.1)) == pytest.approx(3.84 * math.exp(0.1))
    assert float(accuracy_drop_points(0.1)) == pytest.approx(1.9)
    assert float(accuracy_drop_points(10.0)) == 37.5


def test_relative_error_of_the_clip_searched_quantizer():
    """Gaussian weights, groups of 128: .361 / .1146 / .0334 / .0088 within 5 %."""
    weights = np.random.default_rng(0).standard_normal((512, 128))
    for bits in (1, 2, 3, 4):
        error = np.mean((quantize(weights, bits) - weights) ** 2) / np.mean(weights**2)
        assert error == pytest.approx(EPS[bits], rel=0.05)


def quantize(weights: np.ndarray, bits: int) -> np.ndarray:
    """Sign times mean at 1 bit, else uniform with the best of 61 clipped ranges per row."""
    if bits == 1:
        return np.sign(weights) * np.abs(weights).mean(axis=1, keepdims=True)
    best, best_error = np.zeros_like(weights), np.full((len(weights), 1), np.inf)
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    for share in np.linspace(0.3, 1.0, 61):
        step = (high - low) * share / (2**bits - 1)
        codes = np.clip(np.round((weights - low * share) / step), 0, 2**bits - 1)
        candidate = codes * step + low * share
        error = ((candidate - weights) ** 2).sum(axis=1, keepdims=True)
        better = error < best_error
        best, best_error = np.where(better, candidate, best), np.minimum(error, best_error)
    return best


def test_share_of_squared_gates_predicts_the_error_of_a_two_expert_layer():
    """The share form against brute force, below 2 %."""
    rng = np.random.default_rng(1)
    n_tokens, width = 20_000, 64
    gate = rng.uniform(0.2, 0.8, n_tokens)
    gates = np.stack([gate, 1 - gate], axis=1)
    experts = rng.standard_normal((2, width, width)) / math.sqrt(width)
    x = rng.standard_normal((n_tokens, width))
    noise = np.array([0.1, 0.02])
    noisy = experts + np.sqrt(noise)[:, None, None] * rng.standard_normal(experts.shape) / 8
    change = sum(gates[:, [e]] * (x @ (noisy[e] - experts[e])) for e in range(2))
    output = sum(gates[:, [e]] * (x @ experts[e]) for e in range(2))
    measured = (change**2).sum() / (output**2).sum()
    relative = ((noisy - experts) ** 2).sum(axis=(1, 2)) / (experts**2).sum(axis=(1, 2))
    energy = (gates**2).sum(axis=0)
    predicted = (energy * relative).sum() / energy.sum()
    assert measured == pytest.approx(predicted, rel=0.02)
