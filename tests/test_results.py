"""The comparison of agents and heuristics: resamples by hand, curves, and what the page says."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.scenarios import condition_tasks
from policies.all_far import AllFar
from policies.balance import Balance
from train.results.__main__ import main
from train.results.conditions import AGENTS, FORECAST, Measured, Table, row_of
from train.results.contenders import Folders, Heuristic, heuristics
from train.results.fronts import (
    PRICES,
    Curve,
    curve_of,
    gain_at_equal_loss,
    gain_over_range,
    gains_at_budgets,
)
from train.results.measure import Run, run, shares_of
from train.results.opened import command_of
from train.results.page import page
from train.results.regret import Sample, regret_of
from train.results.resampling import Resampling, frontier, interval

ROOT = Path(__file__).resolve().parent.parent
SHARES = [np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0]])]


def test_the_sample_itself_is_the_mean_over_windows() -> None:
    values = [np.array([1.0, 3.0]), np.array([8.0])]
    assert Resampling(SHARES).means(values)[0] == pytest.approx(4.0)


def test_a_resample_weighs_episodes_and_conversations() -> None:
    resampling = Resampling(SHARES, n_resamples=50, seed=3)
    values = [np.array([1.0, 3.0]), np.array([8.0])]
    found = resampling.means(values)
    episodes, conversations = resampling.episodes, resampling.conversations
    for r in range(51):
        top = bottom = 0.0
        for e, (share, value) in enumerate(zip(SHARES, values, strict=True)):
            for window, parts in enumerate(share):
                weight = episodes[r, e] * float(parts @ conversations[r])
                top, bottom = top + weight * value[window], bottom + weight
        if bottom > 0:
            assert found[r] == pytest.approx(top / bottom)
        else:
            assert np.isnan(found[r])


def test_what_is_the_same_everywhere_has_no_interval() -> None:
    constant = [np.full(2, 0.7), np.full(1, 0.7)]
    assert interval(Resampling(SHARES).means(constant)) == pytest.approx((0.7, 0.7))


def test_training_seeds_widen_the_interval() -> None:
    resampling = Resampling([np.eye(6)] * 8, seed=1)
    runs = [[np.full(6, level)] * 8 for level in (0.0, 1.0, 2.0)]
    found = resampling.means_over_seeds(runs)
    assert found[0] == pytest.approx(1.0)
    low, high = interval(found)
    assert low < 0.5
    assert high > 1.5
    np.testing.assert_array_equal(found, resampling.means_over_seeds(runs))


def test_a_frontier_is_the_concave_hull_of_its_points_and_ends_with_them() -> None:
    x = np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    found = frontier(np.array([1.25, 0.5, 2.0]), x, 10 * x)
    np.testing.assert_allclose(found, [12.5, np.nan, 20.0])
    dented = np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [0.2], [1.0]])
    assert frontier(np.array([1.0]), *dented) == pytest.approx([0.5])  # between the outer two
    bulging = dented[0], np.array([[0.0], [0.9], [1.0]])
    assert frontier(np.array([1.0]), *bulging) == pytest.approx([0.9])
    assert frontier(np.array([0.5]), *bulging) == pytest.approx([0.45])


def test_a_heuristic_at_another_price_gains_nothing_over_itself() -> None:
    tasks = condition_tasks(conditions="fix", split="val", n_episodes=1, max_windows=64)
    resampling, mine = Resampling(shares_of(AllFar(), tasks), 1), Heuristic("balance", {})

    def of_prices(*prices: float) -> Curve:
        return curve_of([run(mine.at(price), tasks) for price in prices], resampling)

    curve = of_prices(*(price for price in PRICES if 0.85 < price < 1.2))
    others = of_prices(0.91, 0.97, 1.03, 1.09)
    for loss, speed in zip(others.loss, others.speed, strict=True):
        assert abs(np.expm1(speed - frontier(loss, curve.loss, curve.speed))[0]) < 0.003


def test_a_gain_at_equal_loss_is_a_ratio_of_throughputs() -> None:
    ones = np.ones(100)
    curve = Curve(np.array([0.1 * ones, 0.2 * ones]), np.array([1.0 * ones, 2.0 * ones]))
    gain = gain_at_equal_loss(0.15 * ones, 1.5 * ones + np.log(1.02), curve)
    assert gain == pytest.approx((0.02, 0.02, 0.02))
    assert np.isnan(gain_at_equal_loss(0.3 * ones, ones, curve).value)


def test_curves_are_compared_at_budgets_and_over_all_losses() -> None:
    ones = np.ones(60)
    loss = np.array([0.0 * ones, 0.1 * ones, 0.15 * ones])
    heuristic = Curve(loss, np.array([0.0 * ones, 1.0 * ones, 1.5 * ones]))
    agents = Curve(loss, heuristic.speed + np.log(1.03))
    near, middle, far = gains_at_budgets(agents, heuristic)
    assert near == pytest.approx((0.03, 0.03, 0.03))
    assert middle == pytest.approx((0.03, 0.03, 0.03))
    assert np.isnan(far.value)  # 0.2 nats are beyond both curves
    assert gain_over_range(agents, heuristic) == pytest.approx((0.03, 0.03, 0.03))
    steeper = Curve(loss, heuristic.speed + np.log([[1.0], [4.0], [4.0]]) * ones)
    logs = np.log(4) * (0.5 * 0.1 + 0.05) / 0.15  # rising to 4 x at .1 nats, then 4 x
    assert gain_over_range(steeper, heuristic).value == pytest.approx(np.expm1(logs), rel=1e-3)
    odd = 0.02198847562149539 * ones, 0.32680616635929755 * ones  # low + 1.0 * (high - low) > high
    uneven = Curve(np.array(odd), np.array([0 * ones, ones]))
    assert gain_over_range(uneven, uneven) == pytest.approx((0.0, 0.0, 0.0))


def test_windows_and_shares_pair_whatever_the_policy() -> None:
    tasks = condition_tasks(conditions="rand", split="val", n_episodes=2, max_windows=5)
    one, other = shares_of(AllFar(), tasks), shares_of(Balance(), tasks)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a.sum(axis=1), 1.0)
    found = run(Balance(), tasks)
    for speed, loss, reward, task in zip(found.speed, found.loss, found.reward, tasks, strict=True):
        np.testing.assert_allclose(reward, speed - task.quality_weight * loss)
        assert len(reward) == 5


def fake(level: float, loss: float = 0.1) -> Run:
    return Run(
        speed=[np.full(2, level), np.full(1, level)], loss=[np.full(2, loss), np.full(1, loss)],
        reward=[np.full(2, level), np.full(1, level)], decision_s=0.001, services={"in_place"},
    )  # fmt: skip


def measured(
    level: float, forecast: float = 1.0, section: str = "rand", n_seeds: int = 5
) -> Measured:
    """A section whose best heuristic has reward 1, with one window that 2 are to be had in."""
    resampling = Resampling([np.full((n, 2), 0.5) for n in (2, 1)])
    best, curve = fake(1.0), Curve(np.zeros((2, 2001)), np.zeros((2, 2001)))
    sample = [Sample(episode=0, window=1, bound=2.25, found=2.0)]
    table = Table(best, curve, resampling, sample, ("in_place",))
    rows = [
        row_of("balance, tuned", [best], table),
        row_of(AGENTS, [fake(level)] * n_seeds, table),
        row_of(FORECAST, [fake(forecast)] * n_seeds, table),
    ]
    tuning = {
        "scores": {"reward": 1.0, "reward_untuned": 0.9, "spread_of_tunings": 0.01},
        "tunings": [0, 1, 2],
    }
    return Measured(
        section, 2, 2, "balance, tuned", rows, curve, None, {"balance": tuning},
        {"balance, tuned": 0.75} if ":" in section else {}, sample, "f" * 64,
    )  # fmt: skip


def written(found: Measured, split: str = "test") -> str:
    return page([found], split, [], None, "python -m train.results", Folders())


@pytest.mark.parametrize(
    ("level", "verdict"),
    [
        (1.1, "the agents are better."),
        (1.005, "the agents are better, by less than the spread of its tunings (0.0100)."),
        (0.9, "the heuristic is better."),
        (1.0, "no difference is shown."),
    ],
)
def test_the_page_says_who_is_better(level: float, verdict: str) -> None:
    found = measured(level)
    text = written(found)
    assert verdict in text
    assert "(5 seeds)" in text
    assert found.rows[1].gain.value == pytest.approx(level - 1)


def test_the_page_tells_the_network_from_the_forecast() -> None:
    found = measured(1.25, forecast=1.125)
    assert found.network == pytest.approx((0.125, 0.125, 0.125))
    text = written(found)
    assert "Their forecast alone: reward +0.1250" in text
    assert "the network adds +0.1250 (+0.1250 to +0.1250), more than noise." in text
    assert "Learning by trial" not in text
    noise = written(measured(1.25, forecast=1.25))
    assert "the network adds +0.0000 (+0.0000 to +0.0000), within the noise." in noise
    assert "not shown to add anything to the fitted forecast under `rand`" in noise
    loss = written(measured(1.25, forecast=1.5))
    assert "the network adds -0.2500 (-0.2500 to -0.2500), a loss." in loss
    assert "not shown to add anything to the fitted forecast under `rand`" in loss


def test_every_row_has_its_regret() -> None:
    lines = written(measured(1.25)).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[-3:-1] for line in lines if "ms" not in line}
    assert cells["| **layer agents**"] == ["0.750", "1.000"]
    assert cells["| `balance, tuned`"] == ["1.000", "1.250"]


def test_regret_has_a_standard_error_over_its_windows() -> None:
    sample = [Sample(0, 0, bound=3.0, found=2.0), Sample(1, 0, bound=3.0, found=2.5)]
    found = regret_of([fake(1.0), fake(1.5)], sample, ("in_place",))
    assert found.to_found == pytest.approx((1.0, 0.25))
    assert found.to_bound == pytest.approx((1.75, 0.0))
    assert np.isnan(regret_of([fake(1.0)], sample, ("fetch",)).to_bound[0])


def test_one_training_seed_has_a_row_but_no_spread() -> None:
    text = written(measured(1.25, n_seeds=1))
    assert "layer agents (1 seed) against" in text
    assert "| **layer agents** | 1.2500" in text
    assert "| forecast alone | 1.0000" in text
    assert "Training seeds" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--split", "val"], "--out must name another page than docs/results.md"),
        (["--agents", "nowhere", "--out", "x.md"], "nowhere: no such folder"),
        (["--episodes", "0"], "episodes must be a whole number >= 1, got 0"),
        (["--sections", "warm"], "a section must be one of fix, rand, hidden, drift"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_test_is_opened(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ROOT / "train/results/opened.json").read_bytes()
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert (ROOT / "train/results/opened.json").read_bytes() == before


def test_agents_gains_are_summed_up_robustly_too() -> None:
    text = written(measured(1.25))
    assert "gain over the best heuristic, episodes alike: +0.2500, +0.2500" in text
    assert (
        "interquartile mean +0.2500 (+0.2500 to +0.2500), probability of improvement 100%" in text
    )


def test_another_quality_weight_says_how_its_best_heuristic_was_chosen() -> None:
    text = written(measured(1.0, section="fix:quality"), "val")
    assert "## `fix`: the default environment, quality weight `quality`" in text
    assert "Reward on val at this weight: `balance, tuned` 0.7500. Best: `balance, tuned`." in text
    assert "**A trial on val, not to be quoted.**" in text


def test_untuned_and_tuned_heuristics_follow_the_price() -> None:
    known = heuristics(Folders().tunings_of("rand"))
    assert list(known) == [
        "balance", "balance_feedback", "balance, tuned", "balance_feedback, tuned",
    ]  # fmt: skip
    assert known["balance"].at(2.0).knobs.price == 2.0
    tuned = known["balance_feedback, tuned"]
    assert tuned.at(0.5).knobs.price == pytest.approx(0.5 * tuned.constants["price"])


@pytest.mark.parametrize("conditions", ["fix", "rand", "hidden", "drift"])
def test_agents_of_the_table_ship_with_five_seeds(conditions: str) -> None:
    assert len(Folders().agent_files(conditions)) == 5
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert f"- `{conditions}`: layer agents (5 seeds)" in text


def test_agents_are_found_as_files_and_as_runs(tmp_path: Path) -> None:
    for name in ("rand_0.json", "rand_1/best.json", "rand_1/last.json", "fix_0/best.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = Folders(agents=tmp_path).agent_files("rand")
    assert found == [tmp_path / "rand_0.json", tmp_path / "rand_1/best.json"]


def test_the_command_of_a_page_leaves_out_what_is_of_one_machine() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.x")
    parser.add_argument("--why", default="")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args(
        ["--folder", "/somewhere", "--why", "a b", "--jobs", "1", "--windows", "6"]
    )
    assert command_of(parser, args) == "python -m train.x --why 'a b'"
