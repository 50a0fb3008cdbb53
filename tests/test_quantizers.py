"""The project's own quantizers against the reference table, hand-computed values and laws."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndp_gym import presets
from ndp_gym.quantizers import group_sizes, quantize, relative_error, stored_bits_per_weight

# Errors computed with another implementation (mse_g128 up to 8 bit is the preset format)
MSE_G128 = {**presets.fmt("mse_g128").rel_mse, 5: 0.00220, 6: 0.00054}
MSE_G64 = {1: 0.357, 2: 0.1085, 3: 0.0296, 4: 0.0073, 5: 0.00179, 6: 0.00044}
SMALL_GROUPS = {(2, 8): 0.050, (2, 16): 0.078, (2, 32): 0.097, (3, 16): 0.017}


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_gaussian_weights_have_the_error_of_the_default_format(
    gaussian: np.ndarray, bits: int
) -> None:
    assert relative_error(gaussian, bits) == pytest.approx(MSE_G128[bits], rel=0.015)
    assert relative_error(gaussian, bits, group=64) == pytest.approx(MSE_G64[bits], rel=0.015)


def test_eight_bits_round_to_the_one_digit_of_the_table(gaussian: np.ndarray) -> None:
    assert round(relative_error(gaussian, 8), 5) == MSE_G128[8]


@pytest.mark.parametrize(("bits", "group"), SMALL_GROUPS)
def test_small_groups_have_their_table_error(gaussian: np.ndarray, bits: int, group: int) -> None:
    expected = SMALL_GROUPS[bits, group]
    assert relative_error(gaussian[:128], bits, group) == pytest.approx(expected, abs=0.0006)


@pytest.mark.parametrize(("dof", "expected"), [(10, 0.138), (5, 0.177)])
def test_heavy_tails_cost_what_the_reference_says(dof: int, expected: float) -> None:
    weight = np.random.default_rng(1).standard_t(dof, (512, 2048))
    assert relative_error(weight, 2) == pytest.approx(expected, rel=0.05)


def reference(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The clip search in double precision, one factor after the other."""
    w = weight.astype(np.float64).reshape(-1, group)
    mx, mn = w.max(1, keepdims=True), w.min(1, keepdims=True)
    best = least = None
    for i in range(61):
        r = 0.3 + 0.7 * i / 60
        s = np.maximum(mx - mn, 1e-8) * r / (2**bits - 1)
        z = -mn * r / s
        dq = (np.clip(np.round(w / s + z), 0, 2**bits - 1) - z) * s
        e = ((dq - w) ** 2).sum(1, keepdims=True)
        if best is None:
            best, least = dq, e
        else:
            best, least = np.where(e < least, dq, best), np.minimum(e, least)
    return best.reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_what_the_plain_loop_finds(gaussian: np.ndarray, bits: int) -> None:
    weight = gaussian[:32] + 0.5
    ours, plain = quantize(weight, bits), reference(weight, bits, 128)
    assert ours.dtype == np.float32
    lost, least = ((ours - weight) ** 2).sum(), ((plain - weight) ** 2).sum()
    assert lost == pytest.approx(least, rel=1e-5)
    assert np.mean(np.abs(ours - plain) > 1e-5) < 0.01  # near ties may fall either way


def test_hand_computed_values() -> None:
    row = np.array([[-3.0, 1.0, 1.0, -1.0]])
    assert quantize(row, 1).tolist() == [[-1.5, 1.5, 1.5, -1.5]]
    # errors 1.5^2 + 3 * 0.5^2 = 3 of 12
    assert relative_error(row, 1) == pytest.approx(0.25)
    # four levels 0, 1, 2, 3 hold these exactly; so does any group of its own
    assert quantize([[0.0, 1.0, 2.0, 3.0]], 2).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert relative_error([[7.0, 7.0, 2.0, 2.0]], 1, group=2) == 0.0


def test_rows_that_the_group_does_not_divide_get_even_groups() -> None:
    assert group_sizes(4096) == [128] * 32
    assert group_sizes(40) == [40]
    assert group_sizes(2880) == [126] * 5 + [125] * 18
    # groups of 3, 2 and 2: each constant, so every width is exact
    row = np.array([[1.0, 1.0, 1.0, -2.0, -2.0, 5.0, 5.0]])
    for bits in (1, 2, 4):
        assert quantize(row, bits, group=3).tolist() == row.tolist()


def test_stored_bits_count_scales_and_zero_points() -> None:
    assert stored_bits_per_weight(4096, 4) == 4.25  # b + 32 / g
    assert stored_bits_per_weight(4096, 1) == 1.125  # sign + scale
    assert stored_bits_per_weight(40, 2) == 2 + 32 / 40
    assert stored_bits_per_weight(2880, 3) == 3 + 32 * 23 / 2880


matrices = st.builds(
    lambda seed, rows, columns, dof: (
        np.random.default_rng(seed).standard_t(dof, (rows, columns)).astype(np.float32)
    ),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    dof=st.integers(3, 30),
)
widths = st.integers(1, 8)


@settings(max_examples=30, deadline=None)
@given(matrices, widths, st.integers(1, 200))
def test_error_is_that_of_the_dequantized_matrix(w: np.ndarray, bits: int, group: int) -> None:
    difference = quantize(w, bits, group).astype(np.float64) - w
    expected = np.sum(difference**2) / np.sum(w.astype(np.float64) ** 2)
    assert relative_error(w, bits, group) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_threads_do_not_change_the_error(gaussian: np.ndarray) -> None:
    weight = gaussian[:, :2000]  # groups of 125, more rows than one block holds
    with ThreadPoolExecutor(3) as pool:
        for bits in (1, 3):
            assert relative_error(weight, bits, pool=pool) == relative_error(weight, bits)


@settings(max_examples=30, deadline=None)
@given(matrices, st.integers(2, 8))
def test_search_is_never_worse_than_the_whole_range(w: np.ndarray, bits: int) -> None:
    bound = sum(
        np.sum((np.ptp(part, axis=1) / (2**bits - 1) / 2) ** 2) * part.shape[1]
        for part in np.split(w, np.cumsum(group_sizes(w.shape[1]))[:-1], axis=1)
    )
    assert np.sum((quantize(w, bits) - w) ** 2) <= bound * (1 + 1e-4) + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(5, 30))
def test_error_falls_with_bits(seed: int, dof: int) -> None:
    w = np.random.default_rng(seed).standard_t(dof, (16, 256))
    errors = [relative_error(w, bits) for bits in range(1, 9)]
    assert all(more > less for more, less in pairwise(errors))


@settings(max_examples=30, deadline=None)
@given(matrices, widths, st.integers(-60, 60), st.sampled_from([1, -1]))
def test_scaling_scales_the_result(w: np.ndarray, bits: int, exponent: int, sign: int) -> None:
    scale = np.float32(2.0**exponent)
    assert np.array_equal(quantize(w * scale, bits), quantize(w, bits) * scale)
    if bits == 1 and (w != 0).all():
        assert np.array_equal(quantize(w * sign, 1), quantize(w, 1) * sign)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=4), widths)
def test_constant_groups_are_exact(values: list[float], bits: int) -> None:
    w = np.repeat(np.array([values], np.float32), 8, axis=1)
    tiny = 1e-30 * float(np.abs(w).max())  # below this share single precision has no digits left
    assert np.allclose(quantize(w, bits, group=8), w, rtol=1e-6, atol=tiny)


def test_zeros_stay_zeros() -> None:
    for bits in (1, 2, 8):
        assert not quantize(np.zeros((3, 200)), bits).any()
        assert relative_error(np.zeros((3, 200)), bits) == 0.0


@pytest.mark.parametrize(
    ("weight", "bits", "group", "message"),
    [
        (np.ones(4), 2, 128, r"weight must be a matrix \[out, in\], got shape \(4,\)"),
        (np.ones((0, 4)), 2, 128, "weight must be a matrix"),
        (np.array([[1.0, np.nan]]), 2, 128, "weight must be finite"),
        (np.array([[1.0, -np.inf]]), 2, 128, "weight must be finite"),
        (np.ones((2, 2)), 0, 128, "bits must be in 1..8, got 0"),
        (np.ones((2, 2)), 9, 128, "bits must be in 1..8, got 9"),
        (np.ones((2, 2)), 2, 0, "group and inputs must be >= 1, got 0"),
    ],
)
def test_bad_input_is_named(weight: np.ndarray, bits: int, group: int, message: str) -> None:
    for function in (quantize, relative_error):
        with pytest.raises(ValueError, match=message):
            function(weight, bits, group)
