"""Agents of one, many and other models: who is trained on what, the halves, and what is said."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.agent_file import load_agent
from ndp_gym.inputs import bundled_trace_path
from ndp_gym.trace import RoutingTrace, TraceMetadata
from policies.all_far import AllFar
from policies.balance import Balance
from policies.tuned import read_tuning
from tests.toy_evaluation import requests_of
from train.models import agents
from train.models.__main__ import main
from train.models.agents import Sizes, train_agents, trained_on, updates_of
from train.models.evaluate import (
    FORECAST,
    LEFT_OUT,
    LEFT_OUT_FORECAST,
    OWN,
    PLANNER,
    SHARED,
    UNTUNED,
    Line,
    compared,
    evaluate,
    held_out_tasks,
    on_held_out,
)
from train.models.page import page
from train.models.recordings import Recording, prepared, profile_of
from train.results.fronts import Gain
from train.results.measure import Run
from train.results.opened import Opening
from train.results.resampling import Resampling

SIZES = Sizes(n_windows=64, seeds=(3, 4))


def recording(title: str, n_experts: int = 8, **changes: Any) -> Recording:
    paths = {"path": Path(title), "fitted": Path("f"), "held_out": Path("h"), **changes}
    return Recording(title=title, shape=(2, n_experts, 2), **paths)


def test_every_model_has_its_agent_and_one_that_never_saw_it() -> None:
    a, b, c = recording("a"), recording("b", 64), recording("c")
    found = trained_on([a, b, c])
    assert next(iter(found)) == "own_b"  # the costly one first
    assert found == {
        "own_a": [a], "own_b": [b], "own_c": [c], "all": [a, b, c],
        "without_a": [b, c], "without_b": [a, c], "without_c": [a, b],
    }  # fmt: skip
    assert trained_on([a]) == {"own_a": [a]}


def short_trace() -> RoutingTrace:
    """Three requests of 80 rows, two layers; experts are drawn with weights that fall."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(240, 2, 8)) - 0.4 * np.arange(8)
    ids = np.argsort(-scores, axis=2)[:, :, :2]
    facts: dict[str, Any] = {"model": "short", "n_experts": 8, "top_k": 2}
    return RoutingTrace.from_arrays(ids, requests_of([80] * 3), TraceMetadata(**facts))


def test_a_short_recording_is_halved_and_drawn_long(tmp_path: Path) -> None:
    trace = short_trace()
    found = prepared("Short", trace, tmp_path, 20, 12)
    assert found.fitted is not None
    assert found.held_out is not None
    fitted, held_out = RoutingTrace.open(found.fitted), RoutingTrace.open(found.held_out)
    np.testing.assert_array_equal(fitted.expert_ids[:40], trace.expert_ids[:40])
    np.testing.assert_array_equal(held_out.expert_ids[:40], trace.expert_ids[40:80])
    drawn = RoutingTrace.open(found.path)
    assert np.bincount(drawn.requests.split).tolist() == [10, 5, 5]
    assert drawn.n_rows == 20 * 16  # 12 decode rows and a prompt of a third of that
    assert found.shape == (2, 8, 2)
    profile = profile_of(found.fitted)
    np.testing.assert_allclose(profile.sum(axis=1), 2)  # every token has two experts
    decoded = fitted.expert_ids[np.r_[10:40, 50:80, 90:120], 0]  # ten rows of each are its prompt
    assert profile[0, 0] == pytest.approx((decoded == 0).sum() / 90)


def test_a_recording_with_splits_is_used_as_it_is(tmp_path: Path, tiny_trace: RoutingTrace) -> None:
    found = prepared("Tiny", tiny_trace, tmp_path, 20, 12)
    assert (found.fitted, found.held_out) == (None, None)
    np.testing.assert_array_equal(RoutingTrace.open(found.path).expert_ids, tiny_trace.expert_ids)


def constant(level: float) -> Run:
    values = [np.full(2, level), np.full(1, level)]
    return Run(speed=values, loss=values, reward=values, decision_s=0.0, services=set())


def test_gains_are_over_the_tuned_planner() -> None:
    resampling = Resampling([np.full((n, 2), 0.5) for n in (2, 1)])
    levels = {PLANNER: [1.0], UNTUNED: [0.75], OWN: [1.25, 1.75], SHARED: [1.0, 1.5]}
    planner, gains, shared = compared(
        {name: [constant(level) for level in each] for name, each in levels.items()}, resampling
    )
    assert planner == 1.0
    assert {name: gain.value for name, gain in gains.items()} == {
        UNTUNED: -0.25, OWN: 0.5, SHARED: 0.25,
    }  # fmt: skip
    assert gains[UNTUNED] == pytest.approx((-0.25, -0.25, -0.25))
    assert (gains[OWN].low, gains[OWN].high) == (0.25, 0.75)  # one seed or the other, twice
    assert shared == pytest.approx((-0.25, -0.25, -0.25))  # seeds are drawn together


def line(title: str, section: str, own: float, shared: float, left_out: float, **to: Any) -> Line:
    sure = {OWN: own, SHARED: shared, LEFT_OUT: left_out, UNTUNED: 0.0, FORECAST: 0.0}
    gains = {name: Gain(value, value - 0.01, value + 0.01) for name, value in sure.items()}
    less = Gain(shared - own, 0.0, 0.0)
    real = {OWN: 0.125} if section == "rand" else None
    return Line(recording(title, **to), section, 64, 24, 0.5, gains, less, real, (4, 525))


def test_the_page_counts_where_agents_are_above_and_below() -> None:
    lines = [
        line("a", "rand", 0.03, 0.025, -0.02), line("b", "rand", 0.03, 0.0, 0.005, held_out=None),
        line("a", "drift", 0.0, 0.0, 0.02), line("b", "drift", 0.0, 0.0, 0.0, held_out=None),
    ]  # fmt: skip
    noted = [Opening(date="2026-01-01", commit=None, why="x")]
    text = page(lines, SIZES, "python -m train.models", "test", 16, noted, None)
    assert "|  | `rand` | `drift` |" in text
    assert "| own agent | 2 / 0 / 0 | 0 / 2 / 0 |" in text
    assert "| left-out agent | 0 / 1 / 1 | 1 / 1 / 0 |" in text
    assert "- `rand`: the left-out agent is below the planner on a." in text
    assert text.count("below the planner on") == 1
    assert "is within 0.01 of the own one in 3 of 4 cases; not of b (`rand`)." in text
    assert re.search(r"^\| a \(synthetic\) \| 2 x 8, 2 \| 24 \|$", text, re.M)
    assert re.search(r"^\| b \| 2 x 8, 2 ", text, re.M)
    assert text.count("| a | 64 | 0.5000 | +0.0000 (-0.0100 to +0.0100) |") == 2
    assert "| a | 4, 525 | - | +0.1250 | - | - |" in text
    assert "| a | +0.0000 (-0.0100 to +0.0100) | - | - |" in text
    assert f"(as few as {updates_of(SIZES)} updates)" in " ".join(text.split())
    assert "with 2 seeds, for 64 decode windows" in " ".join(text.split())
    assert "opened 1 times" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--models", "Nobody"], "a model must be one of Mixtral-8x7B, .*, got 'Nobody'"),
        (["--recordings", "nowhere"], "Mixtral-8x7B needs .* below nowhere, which has none"),
        (["--sections", "fix,rnd"], "a section must be one of fix, .*, got 'rnd'"),
        (["--seeds", "0,0"], "seeds must be different whole numbers, .*, got '0,0'"),
        (["--episodes", "0"], "episodes must be .* 1, got 0"),
        (["--split", "val"], "--out must name another page than docs/models.md for a trial"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert re.fullmatch(f"python -m train.models: {said}\n", capsys.readouterr().err)


def test_agents_are_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.ppo.fit_weights", lambda *args: None)
    monkeypatch.setattr(agents, "LANES", 2)
    monkeypatch.setattr(agents, "N_STEPS", 8)
    monkeypatch.setattr(agents, "VAL_EPISODES", 2)
    monkeypatch.setattr("train.models.evaluate.EPISODE_WINDOWS", 8)
    path = bundled_trace_path()
    mine = Recording("bundled", path, None, None, (8, 64, 6))
    best, _ = train_agents("own_bundled", [mine], tmp_path, 16, 3, ["rand", "hidden"])
    assert list(best) == ["rand", "hidden"]
    assert "windows" in (tmp_path / "hidden/own_bundled_3/log.txt").read_text()
    for conditions, file in best.items():
        card = load_agent(file)
        assert card.base == read_tuning(f"balance_feedback_{conditions}")[1]["constants"]
    names = "own_bundled", "without_bundled"
    files = {("rand", name): [best["rand"], best["hidden"]] for name in names}
    found = evaluate(mine, "rand:quality", files, "val", 1)  # with the agents of rand
    assert found.gains.keys() == {UNTUNED, OWN, FORECAST, LEFT_OUT, LEFT_OUT_FORECAST}
    assert found.gains[LEFT_OUT_FORECAST] == found.gains[FORECAST]
    assert found.gains[LEFT_OUT] == found.gains[OWN]
    assert found.gains[FORECAST].value == pytest.approx(0.0, abs=1e-3)  # nothing was fitted
    assert found.shared is None
    assert found.real is None


def test_real_halves_are_run_with_the_profile_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.models.evaluate.EPISODE_WINDOWS", 2)
    path = bundled_trace_path()
    profile = profile_of(path)
    tasks = held_out_tasks(path, profile, 1)
    assert tasks[0].profile is profile
    policies = {PLANNER: [AllFar()], UNTUNED: [AllFar()], OWN: [AllFar(), Balance()]}
    alone = on_held_out(tasks, {PLANNER: [AllFar()], OWN: [Balance()]})[OWN]
    assert alone > 0
    assert on_held_out(tasks, policies) == pytest.approx({UNTUNED: 0.0, OWN: alone / 2})
