"""How training starts: from an agent and its planner, never over another, never in a traceback."""

import io
import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.agent_file import load_agent, save_agent
from policies.agent import LayerAgent, find_agent
from policies.tuned import read_tuning
from train import options
from train.ppo import Args, ValScore, train
from train.resume import with_saved
from train.setting import val_tasks, window_rewards

TINY: dict[str, Any] = {
    "n_windows": 0, "n_lanes": 2, "n_steps": 8, "minibatch": 64, "wandb": "disabled",
    "conditions": "rand", "val_episodes": 2, "episode_windows": 4,
}  # fmt: skip
FITTED = np.arange(30.0).reshape(5, 6) / 300


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of the forecasts that were fitted; the weights are `FITTED`."""
    calls: list[tuple[Any, ...]] = []

    def fit(*args: Any) -> Any:
        calls.append(args)
        return FITTED

    monkeypatch.setattr("train.ppo.fit_weights", fit)
    return calls


def test_a_run_starts_as_the_agent_that_it_starts_from(tmp_path: Path, fits: list[Any]) -> None:
    args = Args(out=str(tmp_path), init="rand_0", **TINY)
    found, shipped = load_agent(train(args)), find_agent("rand_0")
    assert fits == []
    assert found.base == shipped.base
    np.testing.assert_array_equal(found.forecast, shipped.forecast)
    rewards = [window_rewards(LayerAgent("rand_0"), task).mean() for task in val_tasks(args)]
    assert [reward for _, _, reward in found.card["curve"]] == [pytest.approx(np.mean(rewards))]

    again = replace(args, resume=True, n_windows=16)
    assert load_agent(train(again)).base == shipped.base
    assert fits == []


def test_a_base_beside_an_agent_must_be_its_own(tmp_path: Path) -> None:
    args = Args(out=str(tmp_path / "a"), init="rand_0", base="balance_feedback_fix", **TINY)
    with pytest.raises(ValueError, match="balance_feedback_fix has other decay, far_factor, "):
        train(args)
    assert not (tmp_path / "a").exists()
    base = read_tuning("balance_feedback_rand")[1]["constants"]
    assert find_agent("rand_0").base == base
    train(replace(args, base="balance_feedback_rand"))


def test_an_agent_without_a_forecast_gets_a_fitted_one(tmp_path: Path, fits: list[Any]) -> None:
    path = save_agent(replace(find_agent("rand_0"), forecast=None), tmp_path / "start")
    options = {**TINY, "system": "h100_cxl_pnm"}
    found = load_agent(train(Args(out=str(tmp_path / "run"), init=str(path), **options)))
    np.testing.assert_array_equal(found.forecast, FITTED)
    assert fits == [((None,), 16, 0, None, "h100_cxl_pnm")]


def test_an_agent_is_never_overwritten(tmp_path: Path, fits: list[Any]) -> None:
    path = train(Args(out=str(tmp_path), hidden=8, **TINY))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{tmp_path} has an agent already: --resume goes on"):
        train(Args(out=str(tmp_path), hidden=8, seed=1, **TINY))
    assert path.read_bytes() == before


def test_a_smaller_last_mini_batch_is_nothing_to_warn_of(tmp_path: Path, fits: list[Any]) -> None:
    args = {**TINY, "n_windows": 16, "minibatch": 50}  # of 2 copies x 8 layers x 8 windows = 128
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "You have specified a mini-batch size")
        train(Args(out=str(tmp_path), hidden=8, **args))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, fits: list[Any]) -> None:
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train(Args(out=str(tmp_path), resume=True, **TINY))
    train(Args(out=str(tmp_path), hidden=8, **TINY))
    (tmp_path / "checkpoint").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="checkpoint: cannot be resumed"):
        train(Args(out=str(tmp_path), hidden=8, resume=True, **TINY))


def started(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int | str | None:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["ppo", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        options.run(Args, train, "", partial(with_saved, Args))
    return ended.value.code


def test_a_run_goes_on_as_the_experiment_it_was(
    tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = tmp_path / "mine.json"
    base.write_text(json.dumps({"spec": "balance_feedback:price=2.0"}))
    run = tmp_path / "run"
    train(Args(out=str(run), base=str(base), own=0.5, hidden=8, **{**TINY, "n_windows": 16}))
    base.unlink()
    more = ("--out", run, "--resume", "--wandb", "disabled")
    assert started(monkeypatch, *more, "--n-windows", 32) == 0
    best, last = load_agent(run / "best"), load_agent(run / "last").card["training"]
    assert best.base == {"price": 2.0}
    assert [windows for windows, _, _ in best.card["curve"]] == [0, 16, 32]
    assert (last["conditions"], last["own"], last["n_windows"]) == ("rand", 0.5, 32)
    capsys.readouterr()
    assert started(monkeypatch, *more, "--conditions", "fix", "--own", 0) == 2
    said = f"{run} was trained with conditions=rand, own=0.5, got fix, 0.0\n"
    assert capsys.readouterr().err.endswith(said)
    assert started(monkeypatch, *more) == 0
    said = "32 windows are done, nothing is left: a larger --n-windows goes on"
    assert said in capsys.readouterr().out
    assert load_agent(run / "best").card["curve"] == best.card["curve"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_windows", -5), ("eval_every", 0), ("minibatch", 1), ("n_lanes", 0), ("n_steps", 0),
        ("n_epochs", 0), ("hidden", 0), ("gamma", 1.5), ("gae_lambda", -0.1), ("own", 2.0),
        ("learning_rate", float("nan")), ("learning_rate", 0.0), ("seed", -1),
        ("log_std_init", float("inf")), ("val_episodes", 0), ("episode_windows", 0),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
        train(Args(**{**TINY, "out": str(tmp_path / "a"), name: value}))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trace=/nowhere", "/nowhere: No such file"),
        ("--conditions=odd", "conditions must be one of"),
        ("--base=nowhere", "nowhere.json: No such file"),
        ("--init=nowhere", "nowhere.json: No such file"),
        ("--hbm-budget=much", "--hbm-budget must be a share"),
        ("--system=nowhere", "unknown system preset 'nowhere'"),
        ("--minibatch=0", "minibatch must be at least 2, got 0"),
        ("--resume", "has no checkpoint to go on from"),
        ("--luck", "unrecognized arguments: --luck"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    tmp_path: Path, option: str, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, fits: list[Any],
) -> None:  # fmt: skip
    assert started(monkeypatch, "--out", tmp_path / "a", option) == 2
    said = capsys.readouterr().err.rstrip("\n")
    assert message in said
    assert "\n" not in said


def test_ctrl_c_before_the_first_score_ends_quietly(
    tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(self: ValScore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ValScore, "score", interrupted)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert started(monkeypatch, f"--out={tmp_path}", *argv) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("script", ["ppo", "imitate", "tune"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"train.{script}")
    monkeypatch.setattr(module, "val_tasks", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        getattr(module, {"ppo": "train"}.get(script, script))(
            module.Args(out=str(tmp_path / "file" / "run"))
        )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_score_beside_the_lines(
    tmp_path: Path, fits: list[Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    args = Args(out=str(tmp_path / "a"), hidden=8, **{**TINY, "n_windows": 32})
    train(args)
    lines, shown = capsys.readouterr()
    assert shown == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        train(replace(args, out=str(tmp_path / "b")))
        shown = sys.stderr.getvalue()
    score = next(line for line in lines.splitlines() if "32/32 windows" in line)
    val = score.partition("val ")[2].partition(",")[0]
    assert f"val {val}, best " in shown
    assert ", untuned planner 0." in shown
    assert "32/32 " in shown
    gain = float(val) - load_agent(tmp_path / "a/best").card["scores"]["reward_alone"]
    assert float(score.partition("gain ")[2].partition(" +- ")[0]) == pytest.approx(gain, abs=1e-4)
    assert score.split(", ")[-2].endswith(" over the planner")
    assert len(score) < 110
    again = capsys.readouterr().out.splitlines()
    assert [line.partition("val")[2] for line in again[:2]] == [
        line.partition("val")[2] for line in lines.splitlines()[:2]
    ]
