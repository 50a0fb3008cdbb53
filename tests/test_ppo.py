"""What a training run leaves behind: the whole curve in the best agent's card, whatever happens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.agent_file import load_agent
from policies.agent import LayerAgent
from train import curves
from train.ppo import Args, ValScore, said, train
from train.results import pictures
from train.results.contenders import Folders
from train.tracking import Placed, Scored

TINY: dict[str, Any] = {
    "n_windows": 128, "eval_every": 64, "n_lanes": 4, "n_steps": 8, "minibatch": 64, "hidden": 8,
    "wandb": "disabled",
}  # fmt: skip
ALONE = 0.5


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Rewards that agents get on val, in turn; the planner gets `ALONE`. Nothing is fitted.

    Nothing but the curve is for wandb either, since these runs are not tracked.
    """
    rewards: list[float] = []

    def given(policy: object, tasks: object) -> Scored:
        reward = rewards.pop(0) if isinstance(policy, LayerAgent) else ALONE
        return Scored([np.full(4, reward)], [], Placed(np.zeros((2, 3)), np.zeros((2, 3)), 4))

    def untracked(*args: object, **kwargs: object) -> None:
        raise AssertionError("drawn or logged for nobody")

    monkeypatch.setattr("train.ppo.scored", given)
    for name in ("placement_figure", "log_result"):
        monkeypatch.setattr(f"train.ppo.{name}", untracked)
    monkeypatch.setattr("train.ppo.fit_weights", lambda *args: None)
    return rewards


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "best.json").read_text())
    return card


def points(card: dict[str, Any]) -> list[tuple[int, float]]:
    return [(windows, reward) for windows, _, reward in card["curve"]]


def test_the_best_keeps_its_weights_and_the_whole_curve(
    tmp_path: Path, scripted: list[float]
) -> None:
    scripted += [0.4, 0.7, 0.6]
    best = train(Args(out=str(tmp_path), **TINY)).read_bytes()
    card = card_of(tmp_path)
    assert points(card) == [(0, 0.4), (64, 0.7), (128, 0.6)]
    assert card["scores"]["n_windows_trained"] == 64
    assert (card["scores"]["reward"], card["scores"]["reward_alone"]) == (0.7, ALONE)
    assert best != (tmp_path / "last.safetensors").read_bytes()

    scripted += [0.7, 0.65, 0.55]  # resuming, the best is scored again
    train(Args(out=str(tmp_path), **{**TINY, "n_windows": 256, "resume": True}))
    card = card_of(tmp_path)
    assert points(card) == [(0, 0.4), (64, 0.7), (128, 0.6), (192, 0.65), (256, 0.55)]
    assert card["scores"]["reward"] == 0.7
    assert (tmp_path / "best.safetensors").read_bytes() == best
    seconds = [s for _, s, _ in card["curve"]]
    assert seconds == sorted(seconds)
    assert b"reward gained on val" in (tmp_path / "curve.svg").read_bytes()
    assert not (tmp_path / "wandb").exists()


def test_a_line_says_how_far_above_the_planner_an_agent_is_and_how_sure_that_is() -> None:
    gains = {"gain": 0.00871, "gain_standard_error_over_episodes": 0.00112}
    assert said({"reward": 0.82293, **gains, "share_of_episodes_won": 0.9}) == (
        "val 0.8229, gain +0.0087 +- 0.0011 over the planner"
    )


def test_the_first_point_is_the_start_itself(tmp_path: Path, scripted: list[float]) -> None:
    scripted += [0.9, 0.1]
    first = train(Args(out=str(tmp_path / "a"), **{**TINY, "n_windows": 32}))
    start = load_agent(first)
    assert start.card["scores"]["n_windows_trained"] == 0
    scripted += [0.2, 0.3]
    options = {**TINY, "n_windows": 32, "init": str(first)}
    train(Args(out=str(tmp_path / "b"), **options))
    card = card_of(tmp_path / "b")
    assert points(card) == [(0, 0.2), (32, 0.3)]
    scripted += [0.2]
    train(Args(out=str(tmp_path / "c"), **{**options, "n_windows": 0}))
    for (weight, bias), (mine, my_bias) in zip(
        start.layers, load_agent(tmp_path / "c/best").layers, strict=True
    ):
        np.testing.assert_array_equal(weight, mine)
        np.testing.assert_array_equal(bias, my_bias)


def test_a_killed_run_leaves_its_best_and_resumes(
    tmp_path: Path, scripted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ValScore) -> bool:
        if self.n_windows > 96:
            raise RuntimeError("killed")
        return True

    scripted += [0.4, 0.7]
    with monkeypatch.context() as patch:
        patch.setattr(ValScore, "_on_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(Args(out=str(tmp_path), **TINY))
    assert load_agent(tmp_path / "best").card["scores"]["reward"] == 0.7
    assert points(card_of(tmp_path)) == [(0, 0.4), (64, 0.7)]
    scripted += [0.7, 0.6]
    train(Args(out=str(tmp_path), **{**TINY, "resume": True}))
    assert points(card_of(tmp_path)) == [(0, 0.4), (64, 0.7), (128, 0.6)]
    assert load_agent(tmp_path / "best").card["scores"]["reward"] == 0.7


def test_a_finished_run_has_nothing_left_to_score(tmp_path: Path, scripted: list[float]) -> None:
    scripted += [0.4, 0.7, 0.6]
    train(Args(out=str(tmp_path), **TINY))
    scripted += [0.7]
    train(Args(out=str(tmp_path), **{**TINY, "resume": True}))  # nothing is left to do
    assert points(card_of(tmp_path)) == [(0, 0.4), (64, 0.7), (128, 0.6)]
    assert scripted == []


CARD = {"curve": [[0, 0.1, 0.4], [4096, 9.0, 0.7], [8192, 18.0, 0.6]],
        "scores": {"reward_alone": 0.5, "n_windows_trained": 4096}}  # fmt: skip


def test_curves_are_drawn_whole_and_their_best_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def keep(figure: Any) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(pictures, "svg", keep)
    monkeypatch.setattr(curves, "svg", keep)
    (tmp_path / "rand_0.json").write_text(json.dumps(CARD))
    pictures.learning_curves(["rand"], Folders(agents=tmp_path))
    curves.curve_of_run(CARD)
    for figure in figures:
        curve, mark, zero = figure.axes[0].lines
        np.testing.assert_allclose(curve.get_xydata(), [(0, -0.1), (4.096, 0.2), (8.192, 0.1)])
        np.testing.assert_allclose(mark.get_xydata(), [(4.096, 0.2)])
        assert mark.get_color() == curve.get_color()
        assert set(zero.get_ydata()) == {0}
    assert len(figures) == 2
