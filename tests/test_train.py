"""Training in seconds: agents that load without torch, resume, Ctrl-C, tracking, and the table."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ndp_gym.agent_file import Agent, load_agent, save_agent
from ndp_gym.evaluation import evaluate
from ndp_gym.inputs import bundled_trace_path
from ndp_gym.layer_agents import ACTIONS
from ndp_gym.layer_features import FEATURES
from ndp_gym.trace import RoutingTrace
from policies.agent import LayerAgent
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from policies.tuned import read_tuning
from tests.conftest import make_trace
from tests.wandb_reader import LoggedRun, read_run
from train.options import parse
from train.ppo import Args, ValScore, train
from train.setting import Setting, scores_of, val_tasks, window_rewards

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "n_windows": 128, "eval_every": 64, "n_lanes": 4, "n_steps": 8, "minibatch": 64, "hidden": 8,
    "wandb": "disabled",
}  # fmt: skip


N_LAYERS = 8  # of the bundled recording: agents, and so steps, per window


def random_agent(seed: int = 0) -> Agent:
    rng = np.random.default_rng(seed)
    sizes = (len(FEATURES), 8, 8, len(ACTIONS))
    layers = [
        (rng.normal(0, 0.3, (n, m)).astype(np.float32), rng.normal(0, 0.1, n).astype(np.float32))
        for m, n in pairwise(sizes)
    ]
    return Agent(features=FEATURES, layers=layers, card={"training": {"seed": seed}})


def test_an_agent_comes_back_from_its_files_as_it_was(tmp_path: Path) -> None:
    agent = random_agent()
    path = save_agent(agent, tmp_path / "v1.2" / "mine")
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.json", "mine.safetensors"]
    features = np.random.default_rng(1).normal(size=(3, 2, len(FEATURES))).astype(np.float32)
    for name in ("mine", "mine.json", "mine.safetensors"):
        loaded = load_agent(path.parent / name)
        np.testing.assert_array_equal(loaded(features), agent(features))
        assert loaded.card["training"] == {"seed": 0}
        assert list(loaded.features) == list(FEATURES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "pickle"}, "kind must be"),
        ({"features": {"luck": [0, 1]}}, "no features"),
        ({"features": {"log_batch": [0, 1]}}, "must map 1 numbers"),
        ({"actions": ["up"]}, "actions must be"),
        ({"features": None}, "not an agent"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(
    tmp_path: Path, edit: dict[str, Any], message: str
) -> None:
    path = save_agent(random_agent(), tmp_path / "a")
    card = path.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | edit))
    with pytest.raises(ValueError, match=message):
        load_agent(path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = save_agent(random_agent(), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.json: not an agent"):
        load_agent(path)
    with pytest.raises(OSError, match="missing"):
        load_agent(tmp_path / "missing")


def test_equal_seeds_train_equal_agents_and_the_table_takes_them(tmp_path: Path) -> None:
    paths = [train(Args(out=str(tmp_path / name), **TINY)) for name in "ab"]
    one, other = (path.read_bytes() for path in paths)
    assert one == other
    card = json.loads(paths[0].with_suffix(".json").read_text())
    assert card["scores"]["split"] == "val"
    assert card["training"]["seed"] == 0
    for name in ("torch", "stable-baselines3", "numpy"):
        assert card["versions"][name] == version(name)
    result = evaluate(
        [f"agent:path={paths[0]}", "balance"], split="val", seeds=(0, 1), command="test"
    )
    row = next(r for r in result.rows if r["policy"].startswith("agent"))
    assert row["reward"] == pytest.approx(card["scores"]["reward"], rel=1e-9)
    assert row["seeds"] == [0]
    assert row["n_repaired"] == 0


def test_a_run_resumes_and_never_loses_its_best(tmp_path: Path) -> None:
    args = Args(out=str(tmp_path), **TINY)
    best = json.loads(train(args).with_suffix(".json").read_text())["scores"]["reward"]
    longer = Args(**{**vars(args), "n_windows": 256, "resume": True})
    again = json.loads(train(longer).with_suffix(".json").read_text())["scores"]["reward"]
    assert again >= best
    last = json.loads((tmp_path / "last.json").read_text())
    assert last["training"]["n_windows"] == 256


def test_ctrl_c_leaves_a_valid_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ValScore._on_step

    def interrupted(self: ValScore) -> bool:
        if self.n_windows == 64:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(ValScore, "_on_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    path = train(Args(out=str(tmp_path), **{**TINY, "n_windows": 10_000}))
    assert isinstance(LayerAgent(str(path)), LayerAgent)
    assert (tmp_path / "checkpoint").is_file()
    assert [windows for windows, _, _ in load_agent(path).card["curve"]] == [0, 64]
    assert "stopped after 64 windows; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before


def test_training_is_tracked_offline(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "wandb"]
    done = subprocess.run(
        [sys.executable, "-m", "train.ppo", "--out", str(tmp_path), *options,
         "--base", "balance_feedback_fix"],
        cwd=ROOT, env={**env, "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path / "home")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "alone 0." in done.stdout
    run = read_run(tmp_path)
    assert run.exit_code == 0
    assert run.config["training"]["n_windows"] == 128
    assert json.loads(run.config["env_specs"][0])["kwargs"]["window"] == 16
    assert {"val/reward", "val/gain", "val/alone", "train/loss"} <= set().union(*run.history)
    curve = json.loads((tmp_path / "best.json").read_text())["curve"]
    logged = [(h["global_step"] // N_LAYERS, h["val/reward"]) for h in run.history
              if "val/reward" in h]  # fmt: skip
    assert logged == [(windows, reward) for windows, _, reward in curve]
    assert "val/best" in run.summary
    assert_shown_at_start_and_end(run)
    assert_compared(run, tmp_path)
    agent, trace = (next(a for a in run.artifacts if a.type == t) for t in ("model", "trace"))
    assert agent.metadata["reward"] == run.summary["val/best"]
    for name, copy in agent.files.items():
        assert copy.read_bytes() == (tmp_path / name).read_bytes()
    assert set(agent.files) == {"best.safetensors", "best.json"}
    assert [trace.metadata["sha256"]] == run.config["trace_sha256"]
    assert trace.files == {}


def assert_shown_at_start_and_end(run: LoggedRun) -> None:
    shown = [h for h in run.history if h.get("val/placement/_type") == "image-file"]
    assert [h["global_step"] for h in shown] == [0, 128 * N_LAYERS]
    assert all(h["val/placement/width"] > 600 for h in shown)


def assert_compared(run: LoggedRun, out: Path) -> None:
    """The table's rewards are those of the curve, and of policies that are run anew."""
    (path,) = (h["val/policies/path"] for h in run.history if "val/policies/path" in h)
    (file,) = (p for p in out.rglob(Path(path).name) if "latest-run" not in p.parts)
    table = json.loads(file.read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    (task,) = val_tasks(Setting(out=""))
    tuned = BalanceFeedback(**read_tuning("balance_feedback_fix")[1]["constants"])
    for name, policy in (
        ("planner alone", tuned),
        ("balance", Balance()),
        ("balance_feedback", BalanceFeedback()),
    ):
        reward = window_rewards(policy, task).mean()
        assert rows[name]["reward"] == pytest.approx(reward)
        assert rows[name]["gain"] == pytest.approx(reward - run.summary["val/alone"])
    assert rows["agent"]["reward"] == run.summary["val/best"]
    assert rows["balance"]["tokens_per_s"] > 0
    assert {"speedup", "delta_nll_nats"} <= set(table["columns"])


def test_options_are_the_fields_of_the_arguments() -> None:
    args = parse(Args, ["--n-windows", "10", "--gamma", "0.3", "--resume", "--trace", "x"], "")
    assert args == Args(n_windows=10, gamma=0.3, resume=True, trace="x")


def test_help_shows_what_is_left_out_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Args, ["--help"], "")
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("is drawn (default: 0)", "everybody's (default: 0.0)", "(default: 0.0003)"):
        assert default in shown
    assert "False" not in shown
    assert "SUPPRESS" not in shown


def test_the_shipped_agent_scores_on_val_what_its_card_says() -> None:
    card = LayerAgent().agent.card
    known = {f.name for f in fields(Setting)}
    setting = Setting(out="", **{k: v for k, v in card["training"].items() if k in known})
    tasks = val_tasks(setting)
    rewards = [window_rewards(LayerAgent(), task) for task in tasks]
    alone = [window_rewards(BalanceFeedback(**card["base"]), task) for task in tasks]
    scores = scores_of(rewards, alone)
    for name in ("reward", "reward_alone", "gain"):
        assert scores[name] == pytest.approx(card["scores"][name], abs=1e-3)
    assert scores["gain"] > 2 * scores["gain_standard_error_over_episodes"]
    agent = LayerAgent().agent  # nearly all of it is the forecast, as docs/results.md says
    mute = replace(agent, layers=[(0 * weight, 0 * bias) for weight, bias in agent.layers])
    forecast = [window_rewards(LayerAgent.of(mute), task) for task in tasks]
    assert scores_of(forecast, alone)["gain"] > 0.8 * scores["gain"]


@pytest.mark.parametrize("path", sorted((ROOT / "train/experiments").glob("*.yml")), ids=str)
def test_experiments_are_options(path: Path) -> None:
    text = path.read_text()
    args = parse(Args, ["--conf-file", str(path)], "")
    assert f"n_timesteps: {args.n_windows} " in text
    assert args.conditions in text or args.conditions == "fix"
    assert (args.gamma, args.hidden, args.learning_rate, args.window) == (0.5, 64, 3e-4, 16)
    assert f"batch_size: {args.minibatch}\n" in text
    command = next(line for line in text.splitlines() if line.startswith("# python -m train.ppo"))
    assert f"--conf-file {path.relative_to(ROOT)}" in command


def test_the_defaults_are_those_of_the_fixed_experiment() -> None:
    assert parse(Args, ["--conf-file", str(ROOT / "train/experiments/fix.yml")], "") == Args(
        hbm_budget="0.1", base="balance_feedback_fix"
    )


def test_the_sweep_varies_options_that_exist() -> None:
    sweep = yaml.safe_load((ROOT / "train/sweep.yaml").read_text())
    command, last = sweep["command"][2], sweep["command"][-1]
    assert last == "${args}"
    argv = shlex.split(command.partition("train.ppo")[2])[:-1]
    first = [
        values.get("values", [values.get("min")])[0] for values in sweep["parameters"].values()
    ]
    argv += [f"--{name}={value}" for name, value in zip(sweep["parameters"], first, strict=True)]
    args = parse(Args, argv, "")
    assert (args.conditions, args.wandb) == ("rand", "online")
    assert [getattr(args, name) for name in sweep["parameters"]] == first


def test_one_network_learns_from_recordings_of_several_models(tmp_path: Path) -> None:
    trace = make_trace(n_layers=32, n_experts=8, n_conversations=40)
    metadata = replace(trace.metadata, preset="mixtral-8x7b")
    other = RoutingTrace.from_arrays(trace.expert_ids, trace.requests, metadata)
    other.save(tmp_path / "other.safetensors")
    both = f"{bundled_trace_path()},{tmp_path / 'other.safetensors'}"
    options = {**TINY, "n_windows": 32, "eval_every": 100, "n_lanes": 2, "conditions": "rand"}
    args = Args(out=str(tmp_path), trace=both, episode_windows=4, val_episodes=1, **options)
    card = json.loads(train(args).with_suffix(".json").read_text())
    assert len(card["trace_sha256"]) == 2
    assert [n_windows for n_windows, _, _ in card["curve"]] == [0, 32]
    assert card["scores"]["gain"] == pytest.approx(
        card["scores"]["reward"] - card["scores"]["reward_alone"]
    )
    assert "share_of_episodes_won" in card["scores"]
