"""Balance, widths by rank and prefetch, by hand: see `tests.toy` for the round numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ndp_gym.specs import FarSpec, Prefetch, Service
from tests.toy import (
    ALL_FAR,
    ATT,
    MS,
    ONE_EXPERT_PER_TOKEN,
    OUTSIDE,
    SYSTEM,
    TOKEN,
    plan_of,
    start,
    then,
    window_of,
)

QUICK = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=10e6))
"""Ten times the toy's link: a 4-bit expert is copied in 0.3 ms, a token crosses in 0.02 ms."""

TWO_TOKENS = [[[[0, 1], [2, 3]]], [[[0, 2], [2, 3]]]]
"""Layer 0: expert 0 has two tokens, 1 and 2 have one; layer 1: experts 2 and 3 have two each."""

ATT_OF_TWO = ATT + 0.05 * MS  # 100 more tokens of context
ON_GPU = 0.2 + 2 * 0.375  # ms: two 4-bit experts


def test_balance_copies_the_busiest_until_the_slower_side_would_get_slower() -> None:
    plan = plan_of(ALL_FAR, 4, service=Service(kind="balance"))
    _, out = start(plan, window_of(TWO_TOKENS), system=QUICK, budget=0)
    # Layer 0, copied: none 3 ms far; one max(0.675, 2); two max(1.35, 1); three 2.025 ms near.
    # Two it is: experts 0 and 1; the second token's activation crosses for expert 2.
    near, far = ON_GPU + 2 * 0.3, 0.1 + 0.02 + 1
    # Layer 1: none 2 ms; one max(0.675, 1); two 1.35. One copied; both tokens cross for the other.
    near1, far1 = 0.2 + 0.375 + 0.3, 0.1 + 2 * 0.02 + 1
    np.testing.assert_allclose(
        out.layer_s, [ATT_OF_TWO + max(near, far) * MS, ATT_OF_TWO + max(near1, far1) * MS]
    )
    np.testing.assert_allclose(out.layer_s, [0.00050025 + 0.00155, 0.00050025 + 0.00114])
    np.testing.assert_allclose(out.link_s, [(0.6 + 0.12) * MS, (0.3 + 0.14) * MS])
    assert out.fetch_bytes == 3 * 3000
    assert out.activation_bytes == (1 + 2) * 200
    assert out.hits == 0
    assert out.served_tokens.tolist() == [[0, 0, 3 + 2, 0], [0, 0, 1 + 2, 0]]


def test_balance_keeps_pinned_experts_and_counts_their_time() -> None:
    near = plan_of([[0, 0, 1, 1], [1, 1, 1, 1]], 4, service=Service(kind="balance"))
    _, out = start(near, window_of(TWO_TOKENS), system=QUICK, budget=6000)
    # Layer 0: pinned 0 and 1 read in 0.75 ms; moving expert 2 as well would make 1.425 ms of 1 ms.
    assert out.hits == 3
    np.testing.assert_allclose(out.layer_s[0], ATT_OF_TWO + (0.1 + 0.02 + 1) * MS)


def test_credit_is_saved_up_over_layers_steps_and_windows() -> None:
    plan = plan_of(ALL_FAR, 4, service=Service(kind="balance", credit=0.3))
    window = window_of([[TOKEN, TOKEN]])
    state, out = start(plan, window, budget=0)
    # 0.6 per layer: 0.6, 1.2 -> one copied, 0.8, 1.4 -> one copied, 0.4 left
    assert out.fetch_bytes == 2 * 3000
    np.testing.assert_allclose(state.credit, 0.4)
    none_s, one_s = 2 * ATT + 2 * (0.3 + 2) * MS, 0.0005 * MS  # at contexts 100 and 101
    np.testing.assert_allclose(out.layer_s[0], none_s + one_s)
    near = 0.2 + 0.375 + 3
    np.testing.assert_allclose(out.layer_s[1], 2 * ATT + one_s + 2 * near * MS)
    state, out = then(state, plan, window, budget=0)  # 1.0, 0.6, 1.2, 0.8: copies in 1st and 3rd
    assert out.fetch_bytes == 2 * 3000
    np.testing.assert_allclose(out.layer_hits, [0, 0])
    np.testing.assert_allclose(state.credit, 0.8)


def test_a_credit_of_one_copies_everything_and_leaves_the_far_device_idle() -> None:
    plan = plan_of(ALL_FAR, 4, service=Service(kind="balance", credit=1.0))
    state, out = start(plan, window_of([[TOKEN]]), budget=0)
    assert out.fetch_bytes == 4 * 3000
    assert out.far_weight_bytes == out.activation_bytes == 0
    np.testing.assert_allclose(out.layer_s, [ATT + (ON_GPU + 6) * MS] * 2)
    np.testing.assert_allclose(state.credit, 0, atol=1e-12)


def test_rank_bits_fetch_the_first_choice_wide_and_others_narrow() -> None:
    service = Service(kind="fetch", cache="lru", scope="layer", rank_bits=(16, 4))
    plan = plan_of(ALL_FAR, 8, service=service)
    window = window_of([[[[0, 1], [2, 3]], [[1, 0], [2, 3]]]])
    state, out = start(plan, window, budget=2 * 27_000)
    # Layer 0 copies 12000 + 3000 bytes. Then expert 0 is second choice: its 16-bit copy serves;
    # expert 1 is first choice: its 4-bit copy will not do, 12000 bytes more replace it.
    assert out.layer_hits.tolist() == [1, 2]
    assert out.fetch_bytes == (12_000 + 3_000 + 12_000) + (12_000 + 3_000)
    assert state.cache_bits.tolist() == [[16, 16, 0, 0], [0, 0, 16, 4]]
    first, second = 0.1 + 1.5 + 0.2 + 0.375, 0.1 + 2 * 1.5  # two launches; one for equal widths
    layer_s = (first + 15 + second + 12) * MS + 2 * ATT + 0.0005 * MS
    np.testing.assert_allclose(out.layer_s[0], layer_s)
    assert out.served_tokens[0].tolist() == [3 + 2, 0, 1 + 2, 0]


def test_rank_bits_take_the_widest_that_any_token_asks_for() -> None:
    service = Service(kind="fetch", rank_bits=(16, 4))
    plan = plan_of(ALL_FAR, 2, service=service)
    window = window_of([[[[0, 1], [0, 1]]], [[[1, 2], [2, 3]]]])
    _, out = start(plan, window, budget=0)
    assert out.fetch_bytes == (12_000 + 12_000 + 3_000) + (12_000 + 3_000 + 12_000 + 3_000)


def test_a_fetch_completes_a_promotion_only_at_its_width() -> None:
    service = Service(kind="fetch", rank_bits=(4,))
    window = window_of([[[[0]]]], gates=[1.0])
    model = ONE_EXPERT_PER_TOKEN
    state, _ = start(plan_of([[1] * 4], 4, service=service), window, model=model)
    slow = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=1.0))
    eight, _ = then(
        state, plan_of([[0, 1, 1, 1]], 8, service=service), window, model=model, system=slow
    )
    assert eight.hbm_bits.tolist() == [[0, 0, 0, 0]]
    four, _ = then(
        state, plan_of([[0, 1, 1, 1]], 4, service=service), window, model=model, system=slow
    )
    assert four.hbm_bits.tolist() == [[4, 0, 0, 0]]


@pytest.mark.parametrize(
    ("recall", "precision", "layer_ms", "link_ms", "fetched"),
    [
        (1.0, 1.0, ON_GPU, 0.6, 6000),  # hides behind 0.45025 + 0.95 ms
        (0.5, 1.0, ON_GPU + 0.3, 0.6, 6000),  # half was not foreseen
        (0.5, 0.5, ON_GPU + 0.3, 0.9, 9000),  # as many in vain as foreseen
        (1.0, 0.25, 2.4 - 0.45025, 2.4, 24000),  # three in vain for each: the link is the limit
        (0.0, 0.5, ON_GPU + 0.6, 0.6, 6000),
    ],
)
def test_prefetch_hides_what_was_foreseen_behind_a_layer_of_gpu_time(
    recall: float, precision: float, layer_ms: float, link_ms: float, fetched: int
) -> None:
    ahead = Prefetch(recall=recall, precision=precision)
    plan = plan_of(ALL_FAR, 4, service=Service(kind="fetch", prefetch=ahead))
    _, out = start(plan, window_of([[TOKEN]]), system=QUICK, budget=0)
    np.testing.assert_allclose(out.layer_s, [ATT + layer_ms * MS] * 2)
    np.testing.assert_allclose(out.link_s, [link_ms * MS] * 2)
    np.testing.assert_allclose(out.decode_s, out.layer_s.sum() + OUTSIDE)
    assert out.fetch_bytes == 2 * fetched
    assert out.hits == 0  # in time or not, it was not in HBM


@pytest.mark.parametrize(("depth", "exposed_ms"), [(1, 3 - 1.40025), (2, 3 - 2.8005), (9, 0.1995)])
def test_a_deeper_prefetch_starts_with_an_earlier_layer(depth: int, exposed_ms: float) -> None:
    # Layer 0 is pinned and leaves the link idle for 0.45025 + 0.95 ms; the two copies of layer 1
    # take 3 ms at 2 MB/s.
    system = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=2e6))
    service = Service(kind="fetch", prefetch=Prefetch(depth=depth, recall=1.0))
    plan = plan_of([[0, 0, 1, 1], [1, 1, 1, 1]], 4, service=service)
    _, out = start(plan, window_of([[TOKEN]]), system=system, budget=6000)
    np.testing.assert_allclose(out.layer_s, [1.40025 * MS, (1.40025 + exposed_ms) * MS])


def test_a_deep_prefetch_cannot_use_the_link_twice() -> None:
    # Every layer needs 3 ms of the link and 1.40025 ms of its own: however deep, 3 ms a layer,
    # but for the first ones, which nobody could foresee before the step.
    system = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=2e6))
    for depth in (1, 2, 3):
        service = Service(kind="fetch", prefetch=Prefetch(depth=depth, recall=1.0))
        plan = plan_of(ALL_FAR, 4, service=service)
        _, out = start(plan, window_of([[TOKEN] * 6]), system=system, budget=0)
        assert (out.layer_s.sum() + 6 * OUTSIDE).sum() >= 6 * 2 * 3 * MS
        if depth == 1:
            np.testing.assert_allclose(out.layer_s, [6 * 3 * MS] * 2)


def test_only_a_look_of_a_whole_step_ahead_reaches_the_next_token() -> None:
    # Copies of 3 ms per layer; the second step's first copy can start in the first step's second
    # layer only where the predictor looks two layers ahead, as many as the model has.
    quick = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=2e6))
    plan = plan_of(
        [[1, 1, 1, 1], [0, 0, 0, 0]],
        4,
        service=Service(kind="fetch", prefetch=Prefetch(depth=2, recall=1.0)),
    )
    _, out = start(plan, window_of([[TOKEN, TOKEN]]), system=quick, budget=12_000)
    # First step: 3 ms in layer 0, 1.40025 ms in layer 1, 1.6 ms of head and engine. The copies of
    # the second were asked for at the start of that layer 1: they are there before they are needed.
    np.testing.assert_allclose(out.layer_s[0], (3 + 1.40025 + 0.0005) * MS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "in_place", "credit": 0.3}, "credit"),
        ({"kind": "balance", "credit": -0.1}, "credit"),
        ({"kind": "balance", "cache": "lru"}, "keeps no cache"),
        ({"kind": "in_place", "rank_bits": (16, 4)}, "rank_bits"),
        ({"kind": "balance", "prefetch": Prefetch(recall=0.5)}, "rank_bits and prefetch"),
    ],
)
def test_options_belong_to_their_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Service(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 1.1}, "recall"),
        ({"recall": 0.5, "precision": 0.0}, "precision"),
        ({"recall": 0.5, "depth": 0}, "depth"),
    ],
)
def test_prefetch_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prefetch(**options)


def test_balance_needs_a_far_device_that_computes_and_ranks_need_stored_widths() -> None:
    far: FarSpec = replace(SYSTEM.far, can_compute=False)
    plan = plan_of(ALL_FAR, 4, service=Service(kind="balance"))
    with pytest.raises(ValueError, match="needs a far device that computes"):
        start(plan, window_of([[TOKEN]]), system=replace(SYSTEM, far=far))
    plan = plan_of(ALL_FAR, 4, service=Service(kind="fetch", rank_bits=(16, 3)))
    with pytest.raises(ValueError, match="rank_bits must be among"):
        start(plan, window_of([[TOKEN]]))
