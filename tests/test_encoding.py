"""Encodings: every action means a plan, and the one it should."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndp_gym.encoding import KNOBS, LEVELS, KnobSettings, Menu, Scores, encoding_of, steered
from ndp_gym.forecast import Blend
from ndp_gym.lanes import Lanes
from ndp_gym.plan import FAR, HBM
from ndp_gym.planners import Knobs
from ndp_gym.policy import PolicyContext
from ndp_gym.trace import RoutingTrace
from policies.balance import Balance
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

TRACE = make_trace()
WIDTHS = SYSTEM.stored_bits  # 16, 8, 4, 2: 12000, 6000, 3000, 1500 bytes


def lanes_of(budget: Any = 12_000, n_lanes: int = 1, trace: RoutingTrace = TRACE) -> Lanes:
    lanes = Lanes(trace, MODEL, SYSTEM, n_lanes=n_lanes, batch_size=3, window=4, hbm_budget=budget)
    order = trace.split_requests("train")
    for lane in range(n_lanes):
        lanes.reset(lane, np.roll(order, lane))
    return lanes


def scores(
    priorities: Sequence[float],
    *,
    fill: float = 1,
    hbm: float = 0,
    far: float = 0,
    keep: float = -1,
) -> np.ndarray:
    return np.array([[*priorities, fill, hbm, far, keep]], np.float32)


RISING = [-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6]
THIRD = 1 / 3  # with four widths the levels -1, -1/3, 1/3, 1 are 2, 4, 8 and 16 bit


def test_experts_enter_hbm_by_priority_until_the_budget_is_full() -> None:
    decoded = Scores(lanes := lanes_of()).decode(scores(RISING, hbm=-THIRD, far=-1), lanes)
    # 12000 bytes hold four copies at 4 bit
    assert decoded.tier.tolist() == [[[1, 1, 1, 1], [0, 0, 0, 0]]]
    assert decoded.bits.tolist() == [[[2, 2, 2, 2], [4, 4, 4, 4]]]


def test_fill_is_the_share_of_the_budget_that_is_used() -> None:
    decode = Scores(lanes := lanes_of()).decode
    for fill, n_near in ((-1.0, 0), (-0.5, 1), (0.0, 2), (1.0, 4)):
        tier = decode(scores(RISING, fill=fill, hbm=-THIRD), lanes).tier
        assert (tier == HBM).sum() == n_near


def test_between_two_widths_the_experts_of_high_priority_get_the_wider() -> None:
    decode = Scores(lanes := lanes_of()).decode
    # half way from 4 to 8 bit: 6000 bytes for one copy at 8, 6000 for two at 4
    near = decode(scores(RISING, hbm=0.0), lanes)
    assert near.bits[near.tier == HBM].tolist() == [4, 4, 8]
    far = decode(scores(RISING, fill=-1, far=0.0), lanes)
    assert far.bits.tolist() == [[[4, 4, 4, 4], [8, 8, 8, 8]]]


@pytest.mark.parametrize(("level", "width"), [(-1.0, 2), (-THIRD, 4), (THIRD, 8), (1.0, 16)])
def test_the_levels_run_from_the_narrowest_to_the_widest_width(level: float, width: int) -> None:
    decode = Scores(lanes := lanes_of()).decode
    assert np.unique(decode(scores(RISING, hbm=level, far=level), lanes).bits).tolist() == [width]


def test_keep_holds_experts_that_the_last_plan_had_in_hbm() -> None:
    lanes = lanes_of()
    encoding = Scores(lanes)
    lanes.advance(*encoding.decode(scores(RISING, hbm=-THIRD), lanes))
    falling = RISING[::-1]
    swapped = encoding.decode(scores(falling, hbm=-THIRD, keep=-1), lanes)
    assert swapped.tier.tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1]]]
    kept = encoding.decode(scores(falling, hbm=-THIRD, keep=1), lanes)
    # 0.6 and 0.4 stand against 0.0 + 1 ... -0.8 + 1: the two best newcomers replace the last two
    assert kept.tier.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]


def test_equal_priorities_go_to_the_lower_layer_and_expert() -> None:
    decoded = Scores(lanes := lanes_of()).decode(scores([0.5] * 8, hbm=-THIRD), lanes)
    assert decoded.tier.tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1]]]


def test_scores_outside_the_box_are_clipped() -> None:
    decode = Scores(lanes := lanes_of()).decode
    wild = decode(scores([9.0, -9.0] * 4, fill=7, hbm=-8, far=12, keep=-3), lanes)
    tame = decode(scores([1.0, -1.0] * 4, fill=1, hbm=-1, far=1, keep=-1), lanes)
    for got, expected in zip(wild, tame, strict=True):
        np.testing.assert_array_equal(got, expected)


def greedy(action: np.ndarray, held: np.ndarray, budget: int) -> tuple[list[int], list[int]]:
    """The decoder in plain Python; ``held`` are the widths in HBM, all of them wanted."""
    sizes = {16: 12000, 8: 6000, 4: 3000, 2: 1500, 0: 0}
    narrow_first = WIDTHS[::-1]
    fill, hbm, far, keep = (0.5 + 0.5 * float(level) for level in action[8:])

    def pair(level: float) -> tuple[int, int, float]:
        position = level * (len(WIDTHS) - 1)
        position = round(position) if abs(position - round(position)) < 1e-4 else position
        low = min(int(position), len(WIDTHS) - 1)
        return narrow_first[min(low + 1, len(WIDTHS) - 1)], narrow_first[low], position - low

    rank = sorted(range(8), key=lambda x: (-(float(action[x]) + keep * bool(held[x])), x))
    wide, narrow, share = pair(hbm)
    room, used, tier, bits, left = int(fill * budget), 0, [1] * 8, [0] * 8, []
    for x in rank:
        for width, limit in ((wide, int(share * room)), (narrow, room)):
            charge = max(sizes[width], sizes[int(held[x])])
            if used + charge <= limit:
                used, tier[x], bits[x] = used + charge, 0, width
                break
        else:
            left.append(x)
    wide, narrow, share = pair(far)
    for position, x in enumerate(left):
        bits[x] = wide if position < int(share * len(left) + 0.5) else narrow
    return tier, bits


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 60_000))
def test_scores_never_need_repair_and_agree_with_a_plain_decoder(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    lanes = lanes_of(budget=budget)
    encoding = Scores(lanes)
    while not lanes.is_done[0] and lanes.schedule.generated[0] < 40:
        action = rng.uniform(-1, 1, 12).astype(np.float32)
        decoded = encoding.decode(action[None], lanes)
        state = lanes.simulator.state
        if (state.hbm == state.target).all():  # the plain decoder does not know of copies in flight
            tier, bits = greedy(action, state.hbm[0], budget)
            assert decoded.tier.ravel().tolist() == tier
            assert decoded.bits.ravel().tolist() == bits
        assert lanes.advance(*decoded).n_repaired[0] == 0


def test_a_choice_on_the_menu_is_a_tier_and_a_width() -> None:
    lanes = lanes_of(n_lanes=2)
    menu = Menu(lanes)
    assert menu.pairs == tuple((tier, bits) for tier in (HBM, FAR) for bits in WIDTHS)
    decoded = menu.decode(np.stack([np.arange(8), np.full(8, 7)]), lanes)
    assert decoded.tier[0].ravel().tolist() == [0] * 4 + [1] * 4
    assert decoded.bits[0].ravel().tolist() == [16, 8, 4, 2] * 2
    assert decoded.bits[1].ravel().tolist() == [2] * 8
    assert decoded.order is None


def test_a_placement_over_budget_is_repaired_and_counted() -> None:
    lanes = lanes_of(budget=12_000)
    outcome = lanes.advance(*Menu(lanes).decode(np.zeros((1, 8), np.int64), lanes))
    assert outcome.n_repaired[0] == 7  # one copy at 16 bit fits


def test_knobs_at_zero_are_the_balance_policy() -> None:
    lanes = lanes_of()
    encoding, policy = KnobSettings(lanes), Balance()
    policy.reset(
        PolicyContext(model=MODEL, system=SYSTEM, batch_size=3, window=4, hbm_budget_bytes=12_000)
    )
    for _ in range(6):
        plan = policy({name: array[0] for name, array in lanes.observe().items()})
        decoded = encoding.decode(np.zeros((1, len(KNOBS) + 1)), lanes)
        np.testing.assert_array_equal(decoded.tier[0], plan.placement.tier)
        np.testing.assert_array_equal(decoded.bits[0], plan.placement.bitwidth)
        np.testing.assert_array_equal(decoded.order[0], plan.migration_order)
        lanes.advance(*decoded)


def test_each_knob_scales_one_constant_up_and_down() -> None:
    assert steered(np.zeros(8)) == (Knobs(), Blend())
    for column, (name, factor) in enumerate(KNOBS.items()):
        for sign in (-1.0, 1.0):
            action = np.zeros(8)
            action[column] = sign
            constants = steered(action)
            changed = constants[0] if hasattr(Knobs(), name) else constants[1]
            default = getattr(type(changed)(), name)
            assert getattr(changed, name) == pytest.approx(default * factor**sign)
    longer, shorter = (steered(np.array([0.0] * 7 + [a]))[1].decay for a in (1.0, -1.0))
    assert shorter < Blend().decay < longer < 1


@pytest.mark.parametrize(
    ("name", "actions", "message"),
    [
        ("scores", np.zeros((1, 11)), r"shape \(1, 12\), got \(1, 11\)"),
        ("scores", np.full((1, 12), np.nan), "scores must be finite"),
        ("scores", np.full((1, 12), np.inf), "scores must be finite"),
        ("placement", np.full((1, 8), 8), r"must be in 0\.\.7, got 8\.\.8"),
        ("placement", np.full((1, 8), -1), r"must be in 0\.\.7"),
        ("placement", np.zeros((1, 8)), "must be integers"),
        ("knobs", np.full((1, 8), np.nan), "knobs must be finite"),
    ],
)
def test_an_action_without_meaning_is_refused(name: str, actions: np.ndarray, message: str) -> None:
    lanes = lanes_of()
    with pytest.raises(ValueError, match=message):
        encoding_of(name, lanes).decode(actions, lanes)


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"action must be one of .*got 'greedy'"):
        encoding_of("greedy", lanes_of())


def test_the_levels_are_documented_in_order() -> None:
    from ndp_gym import decoders

    indices = decoders.FILL, decoders.HBM_WIDTH, decoders.FAR_WIDTH, decoders.KEEP
    assert indices == tuple(range(len(LEVELS)))
