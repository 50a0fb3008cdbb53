"""What serves a miss, by hand: copies on demand, their caches, and widths made far away."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from ndp_gym.specs import Service
from tests.toy import (
    ALL_FAR,
    ATT,
    MS,
    ONE_EXPERT_PER_TOKEN,
    SYSTEM,
    TOKEN,
    plan_of,
    start,
    then,
    window_of,
)


@pytest.mark.parametrize(
    ("cache", "visits", "hits", "left"),
    [
        ("none", [0, 0, 1, 2, 0], 0, []),
        ("lru", [0, 0, 1, 2, 0], 1, [0, 2]),
        ("lfu", [0, 0, 1, 2, 0], 2, [0, 2]),
        ("fifo", [0, 0, 1, 2, 0], 1, [0, 2]),
        ("lru", [0, 1, 0, 2, 0, 1], 2, [0, 1]),
        ("fifo", [0, 1, 0, 2, 0, 1], 1, [0, 1]),
    ],
)
def test_fetched_copies_stay_as_the_cache_rule_says(
    cache: Literal["none", "lru", "lfu", "fifo"], visits: list[int], hits: int, left: list[int]
) -> None:
    service = Service(kind="fetch", cache=cache)
    plan = plan_of([[1] * 4], 4, service=service)
    window = window_of([[[[e]] for e in visits]], gates=[1.0])
    state, out = start(plan, window, model=ONE_EXPERT_PER_TOKEN, budget=2 * 3000 + 2999)
    assert out.hits == hits
    assert out.fetch_bytes == (len(visits) - hits) * 3000
    assert np.flatnonzero(state.cache_bits[0]).tolist() == left
    on_gpu = 0.2 + 0.375
    miss = on_gpu + 3
    assert out.layer_s[0] == pytest.approx(
        ((len(visits) - hits) * miss + hits * on_gpu) * MS
        + sum(0.40025 * MS + (100 + w) * 0.0005 * MS for w in range(len(visits)))
    )
    assert out.served_tokens[0].tolist() == [0, 0, len(visits), 0]
    assert out.activation_bytes == out.far_weight_bytes == 0


def test_a_cached_copy_at_another_width_is_a_miss() -> None:
    service = Service(kind="fetch", cache="lru")
    window = window_of([[[[0]]]], gates=[1.0])
    state, _ = start(plan_of([[1] * 4], 4, service=service), window, model=ONE_EXPERT_PER_TOKEN)
    same, out = then(
        state, plan_of([[1] * 4], 4, service=service), window, model=ONE_EXPERT_PER_TOKEN
    )
    assert out.hits == 1
    _, out = then(same, plan_of([[1] * 4], 8, service=service), window, model=ONE_EXPERT_PER_TOKEN)
    assert out.hits == 0
    assert out.fetch_bytes == 6000


def test_a_cached_copy_becomes_the_pinned_one_without_moving() -> None:
    service = Service(kind="fetch", cache="lru")
    window = window_of([[[[0]]]], gates=[1.0])
    state, _ = start(plan_of([[1] * 4], 4, service=service), window, model=ONE_EXPERT_PER_TOKEN)
    pinned = plan_of([[0, 1, 1, 1]], 4, service=service)
    state, out = then(state, pinned, window, model=ONE_EXPERT_PER_TOKEN)
    assert out.hits == 1
    assert out.migration_bytes == out.fetch_bytes == 0
    assert state.hbm_bits[0, 0] == 4
    assert not state.cache_bits.any()


def test_a_fetch_of_a_queued_expert_completes_its_promotion() -> None:
    service = Service(kind="fetch")
    window = window_of([[[[1]]]], gates=[1.0])
    state, _ = start(plan_of([[1] * 4], 16, service=service), window, model=ONE_EXPERT_PER_TOKEN)
    wanted = plan_of([[0, 1, 1, 1]], 16, service=service)
    slow_link = replace(SYSTEM, link=replace(SYSTEM.link, bandwidth_bytes_per_s=1e5))
    state, out = then(state, wanted, window, model=ONE_EXPERT_PER_TOKEN, system=slow_link)
    # spare: attention 0.45025 ms + GPU 1.6 ms at 0.1 byte/us; the fetch itself fills the link
    assert out.migration_bytes == state.head_bytes == 205
    needed = window_of([[[[0]], [[0]]]], gates=[1.0])
    state, out = then(state, wanted, needed, model=ONE_EXPERT_PER_TOKEN, system=slow_link)
    assert out.hits == 1
    assert out.fetch_bytes == 12_000
    assert out.wasted_bytes == 205
    assert state.head_bytes == state.queue.size == 0
    assert state.hbm_bits[0, 0] == 16


def test_storage_that_cannot_compute_fetches_by_default_and_in_the_reference() -> None:
    storage = replace(SYSTEM, far=replace(SYSTEM.far, can_compute=False))
    _, out = start(plan_of(ALL_FAR, 16), window_of([[TOKEN]]), system=storage)
    assert out.fetch_bytes == 4 * 12_000
    np.testing.assert_allclose(out.layer_s, [ATT + (0.1 + 2 * 1.5 + 2 * 12) * MS] * 2)
    np.testing.assert_allclose(out.ref_layer_s, [ATT + (0.2 + 2 * 0.375 + 2 * 3) * MS] * 2)
    with pytest.raises(ValueError, match="in_place"):
        start(
            plan_of(ALL_FAR, service=Service(kind="in_place")), window_of([[TOKEN]]), system=storage
        )


def test_requantising_is_charged_once_per_new_width() -> None:
    making = replace(SYSTEM, requantise=True)
    widths = [[4, 16, 16, 16], [16, 16, 16, 8]]
    state, out = start(plan_of(ALL_FAR, widths), window_of([[TOKEN]]), system=making)
    # read 12000 and write 3000 (6000) bytes at 3 MB/s: 5 ms and 6 ms
    np.testing.assert_allclose(out.requantise_s, 11 * MS)
    np.testing.assert_allclose(out.load_s, 11 * MS)
    np.testing.assert_allclose(out.decode_s, out.step_s.sum())
    state, out = then(state, plan_of(ALL_FAR, widths), window_of([[TOKEN]]), system=making)
    assert out.requantise_s == 0
    widths[0][0] = 2
    _, out = then(state, plan_of(ALL_FAR, widths), window_of([[TOKEN]]), system=making)
    np.testing.assert_allclose(out.requantise_s, (12_000 + 1_500) / 3e6)
    np.testing.assert_allclose(out.decode_s, out.step_s.sum() + out.requantise_s)
