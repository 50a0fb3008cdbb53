"""What a training run shows: where experts were, and the table of policies, from known numbers."""

import numpy as np
import pytest

from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.rollout import Measurement
from ndp_gym.scenarios import condition_tasks
from train.setting import window_rewards
from train.tracking import Placed, Scored, comparison, placement_figure, scored


class EveryOther:
    """All far at 4 bit; in every other window, from the first, expert 5 of layer 2 at 16 in HBM."""

    def reset(self, context: PolicyContext) -> None:
        self.shape = (context.model.n_layers, context.model.n_experts)
        self.n_windows = 0

    def __call__(self, observation: Observation) -> Plan:
        tier, bits = np.full(self.shape, FAR, np.uint8), np.full(self.shape, 4, np.uint8)
        if self.n_windows % 2 == 0:
            tier[2, 5], bits[2, 5] = HBM, 16
        self.n_windows += 1
        return Plan(placement=Placement(tier=tier, bitwidth=bits))


def test_placements_are_those_of_the_first_episode() -> None:
    tasks = condition_tasks(conditions="fix", n_episodes=2, max_windows=4)
    found = scored(EveryOther(), tasks)
    share, bits = np.zeros((8, 64)), np.full((8, 64), 4.0)
    share[2, 5], bits[2, 5] = 0.5, 10.0
    np.testing.assert_array_equal(found.placed.hbm_share, share)
    np.testing.assert_array_equal(found.placed.mean_bits, bits)
    assert found.placed.n_windows == 4
    for rewards, task in zip(found.rewards, tasks, strict=True):
        np.testing.assert_array_equal(rewards, window_rewards(EveryOther(), task))


def test_maps_show_agent_planner_and_difference_in_the_planners_order() -> None:
    alone = Placed(np.array([[0.0, 0.75, 0.25]]), np.array([[2.0, 8.0, 4.0]]), 4)
    agent = Placed(np.array([[0.5, 0.5, 0.25]]), np.array([[2.0, 6.0, 4.0]]), 4)
    figure = placement_figure(agent, alone)
    maps = [axes.images[0] for axes in figure.axes[:6]]
    shown = [image.get_array().tolist()[0] for image in maps]
    assert shown == [
        [0.5, 0.25, 0.5],
        [0.75, 0.25, 0.0],
        [-0.25, 0.0, 0.5],
        [6.0, 4.0, 2.0],
        [8.0, 4.0, 2.0],
        [-2.0, 0.0, 0.0],
    ]
    assert [image.get_clim() for image in maps] == [
        (0, 1), (0, 1), (-0.5, 0.5), (2, 8), (2, 8), (-2, 2),
    ]  # fmt: skip


def test_policies_that_do_the_same_can_be_drawn() -> None:
    same = Placed(np.zeros((2, 3)), np.full((2, 3), 4.0), 1)
    maps = [axes.images[0] for axes in placement_figure(same, same).axes[:6]]
    assert maps[3].get_clim() == (4, 5)
    assert maps[5].get_clim() == (-0.01, 0.01)


def reached(rewards: list[list[float]], tokens: list[float], loss: list[float]) -> Scored:
    """Episodes of two seconds each, a third faster than the reference."""
    runs = [
        Measurement(
            totals={"tokens": n, "decode_s": 2.0}, served=np.zeros((2, 1), np.int64),
            tokens=np.array([n]), seconds=np.array([2.0]), loss=np.array([lost]),
            terms={"throughput": [np.log(1.5), np.log(1.5)]},
        )
        for n, lost in zip(tokens, loss, strict=True)
    ]  # fmt: skip
    placed = Placed(np.zeros((1, 1)), np.zeros((1, 1)), 2)
    return Scored([np.array(values) for values in rewards], runs, placed)


def test_the_table_has_rewards_gains_and_speeds() -> None:
    table = comparison(
        {
            "agent": reached([[0.5, 0.7], [0.1, 0.3]], [100.0, 300.0], [2.0, 10.0]),
            "planner": reached([[0.4, 0.6], [0.2, 0.2]], [100.0, 300.0], [1.0, 3.0]),
        },
        "planner",
    )
    agent, planner = (dict(zip(table.columns, row, strict=True)) for row in table.data)
    assert agent["reward"] == pytest.approx(0.4)
    assert agent["gain"] == pytest.approx(0.05)  # .1 in the first episode, 0 in the second
    assert agent["gain_standard_error_over_episodes"] == pytest.approx(0.05)
    assert agent["tokens_per_s"] == pytest.approx(400 / 4)
    assert agent["speedup"] == pytest.approx(1.5)
    assert agent["delta_nll_nats"] == pytest.approx(12 / 400)
    assert (planner["policy"], planner["gain"]) == ("planner", 0)
