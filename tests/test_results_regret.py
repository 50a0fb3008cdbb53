"""Regret by hand, its sample of windows, and the count of how often test was opened."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.bound import WindowBound
from ndp_gym.plan import FAR, HBM, Placement
from policies.all_far import AllFar
from policies.oracle_balance import OracleBalance
from tests.toy_evaluation import task_of, toy_trace
from train.results.__main__ import OPENED, main
from train.results.measure import Run, run
from train.results.opened import note_opening, openings, table
from train.results.regret import Sample, regret_of, relaxed, sampled

SAMPLE = [
    Sample(episode=0, window=1, bound=1.0, found=0.75),
    Sample(episode=1, window=0, bound=2.0, found=1.75),
]


def earned(*rewards: list[float], services: set[str] | None = None) -> Run:
    values = [np.array(r) for r in rewards]
    return Run(
        speed=values, loss=values, reward=values, decision_s=0.0, services=services or {"in_place"}
    )


def test_regret_is_what_the_sampled_windows_leave() -> None:
    one, other = earned([9.0, 0.5], [0.5, 9.0]), earned([9.0, 0.25], [0.25, 9.0])
    for runs, to_found, to_bound in (([one], 0.75, 1.0), ([one, other], 0.875, 1.125)):
        found = regret_of(runs, SAMPLE, ["in_place"])
        assert (found.to_found[0], found.to_bound[0]) == pytest.approx((to_found, to_bound))


def test_regret_to_a_bound_of_another_service_is_none() -> None:
    fetching = earned([9.0, 0.5], [0.5, 9.0], services={"fetch", "in_place"})
    assert np.isnan(regret_of([fetching], SAMPLE, ["in_place", "balance"])).all()
    assert np.isnan(regret_of([earned([1.0])], [], ["in_place"])).all()


def test_the_search_lies_between_what_policies_earn_and_the_bound() -> None:
    tasks = [
        replace(task_of(toy_trace([9, 13]), batch_size=b), hbm_budget=20_000) for b in (1, 2, 1)
    ]
    sample = sampled(OracleBalance(), tasks, 2, seed=5)
    assert [each.episode for each in sample] == [0, 2]
    assert sample == sampled(OracleBalance(), tasks, 2, seed=5)
    for policy in (AllFar(), OracleBalance()):
        rewards = run(policy, tasks).reward
        for each in sample:
            assert rewards[each.episode][each.window] <= each.found + 1e-12
            assert each.found <= each.bound + 1e-12
    assert all(each.found > 0.1 for each in sample)  # HBM for two experts is worth something


def test_the_relaxed_optimum_is_a_placement() -> None:
    pinned = np.array([[0, 16], [4, 0]], np.uint8)
    planned = Placement(tier=np.zeros((2, 2), np.uint8), bitwidth=np.full((2, 2), 2, np.uint8))
    found = relaxed(WindowBound(1.0, "in_place", pinned), planned)
    np.testing.assert_array_equal(found.tier, [[FAR, HBM], [HBM, FAR]])
    np.testing.assert_array_equal(found.bitwidth, [[2, 16], [4, 2]])


def test_every_opening_of_test_is_added_to_those_before(tmp_path: Path) -> None:
    path = tmp_path / "opened.json"
    assert openings(path) == []
    note_opening(path, "0123456789abcdef", "first")
    noted = note_opening(path, None, "second")
    assert noted == openings(path)
    assert [(each["commit"], each["why"]) for each in noted] == [
        ("0123456789abcdef", "first"), (None, "second"),
    ]  # fmt: skip
    assert table(noted)[2:] == ["| 1 | first | `0123456789ab` |", "| 2 | second | `unknown` |"]


def test_what_was_opened_before_is_not_forgotten() -> None:
    noted = json.loads(OPENED.read_text(encoding="utf-8"))
    assert [each["date"] for each in noted[:2]] == ["2026-11-28", "2026-11-28"]
    assert [each["date"] for each in noted] == sorted(each["date"] for each in noted)


@pytest.mark.parametrize("section", ["wet", "fix:", "fix:cheap"])
def test_a_section_that_does_not_exist_opens_nothing(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = OPENED.read_bytes()
    assert main(["--sections", f"fix,{section}"]) == 2
    assert f"got {section!r}" in capsys.readouterr().err
    assert OPENED.read_bytes() == before
