"""Tuning starts at the defaults, keeps to its budget, finds optima; its file is a policy."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.forecast import Blend
from ndp_gym.planners import Knobs
from ndp_gym.policy import resolve
from ndp_gym.rollout import Task
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from policies.tuned import tuned
from train import tune as tuning
from train.tune import RANGES, Args, Range, tune

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "policy": "ema", "n_windows": 32, "n_tunings": 2, "population": 4, "train_windows": 8,
    "episode_windows": 4,
}  # fmt: skip


@pytest.mark.parametrize("policy", sorted(RANGES))
def test_a_search_starts_at_the_policys_defaults_and_inside_its_ranges(policy: str) -> None:
    made = resolve(policy)()
    if isinstance(made, Balance):
        defaults = {f.name: f.default for kind in (Knobs, Blend) for f in fields(kind)}
        if isinstance(made, BalanceFeedback):
            defaults["gain"] = made.gain
        assert set(RANGES[policy]) == set(defaults)
    else:
        defaults = vars(made)
    for name, span in RANGES[policy].items():
        if name not in ("gates", "intensity"):  # off by default, on where they are tuned
            assert span.start == defaults[name]
        assert span.value(span.start_place) == pytest.approx(span.start)


def test_places_are_constants_on_their_scale() -> None:
    assert Range(1.0, 100.0, 10.0, "log").value(0.5) == pytest.approx(10)
    assert Range(1.0, 100.0, 10.0).value(0.5) == pytest.approx(50.5)
    assert Range(1, 4, 4, "whole").value(0.4) == 2


def test_equal_seeds_tune_equally_within_the_budget_and_the_file_is_a_policy(
    tmp_path: Path,
) -> None:
    paths = [
        tune(Args(out=str(tmp_path / n), jobs=jobs, **TINY)) for n, jobs in [("a", 1), ("b", 2)]
    ]
    one, other = (json.loads(path.read_text()) for path in paths)
    assert one == other
    assert [t["seed"] for t in one["tunings"]] == [0, 1]
    assert all(0 < t["n_windows"] <= 32 for t in one["tunings"])
    scores, on_val = one["scores"], [t["reward"] for t in one["tunings"]]
    assert scores["reward"] == max(on_val)
    assert scores["spread_of_tunings"] == pytest.approx(max(on_val) - min(on_val))
    assert scores["gain"] == pytest.approx(scores["reward"] - scores["reward_untuned"])
    policy: Any = tuned(str(tmp_path / "a" / "ema_fix"))
    assert {"bits": policy.bits, "far_bits": policy.far_bits} == one["constants"]
    assert vars(resolve(one["spec"])()) == vars(policy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_tunings", 0), ("n_windows", -1), ("population", 1), ("jobs", 0), ("seed", -1)],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        tune(Args(out=str(tmp_path), **{**TINY, name: value}))
    assert not list(tmp_path.iterdir())


def test_the_search_finds_an_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"bits": 1.7, "alpha": 0.9}

    def rewards_of(spec: str, tasks: list[Task]) -> list[np.ndarray]:
        made = resolve(spec)()
        distance = ((made.bits - best["bits"]) / 3) ** 2 + (made.alpha - best["alpha"]) ** 2
        return [np.full(4, -distance) for _ in tasks]

    monkeypatch.setattr(tuning, "rewards_of", rewards_of)
    args = {**TINY, "policy": "context_aware", "n_windows": 4_000, "population": 20}
    found = json.loads(tune(Args(out=str(tmp_path), **args)).read_text())
    assert found["constants"] == pytest.approx(best, abs=0.05)
    assert found["scores"]["gain"] > 0


@pytest.mark.parametrize(("n_calls", "seeds"), [(4, []), (7, [0]), (14, [0, 1])])
def test_ctrl_c_keeps_what_was_found_and_starts_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_calls: int, seeds: list[int]
) -> None:
    calls = []

    def interrupted(spec: str, tasks: list[Task]) -> list[np.ndarray]:
        calls.append(spec)
        if len(calls) == n_calls:
            os.kill(os.getpid(), signal.SIGINT)
        return [np.full(8, len(calls) * 1.0)]

    monkeypatch.setattr(tuning, "rewards_of", interrupted)
    # val, then 4 constants per generation and 2 generations per tuning, each scored on val
    args = Args(out=str(tmp_path), **{**TINY, "n_windows": 64, "n_tunings": 3})
    before = signal.getsignal(signal.SIGINT)
    if not seeds:  # the first generation is not done
        with pytest.raises(KeyboardInterrupt):
            tune(args)
        assert not list(tmp_path.iterdir())
    else:
        found = json.loads(tune(args).read_text())["tunings"]
        assert [(one["seed"], len(one["train"])) for one in found] == [
            (seed, 1 if seed == seeds[-1] else 2) for seed in seeds
        ]
        assert [p.name for p in tmp_path.iterdir()] == ["ema_fix.json"]
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_stops_every_process_and_keeps_what_they_found(tmp_path: Path) -> None:
    options = {**TINY, "n_windows": 10**6, "n_tunings": 4, "jobs": 2}
    running = subprocess.Popen(
        [sys.executable, "-m", "train.tune", f"--out={tmp_path}",
         *(f"--{name}={value}" for name, value in options.items())],
        cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    seen: set[str] = set()
    while len(seen) < 2:
        line = running.stdout.readline()
        assert line, "it ended by itself"
        seen |= {line.partition(":")[0]} if line.startswith("seed ") else set()
    os.killpg(running.pid, signal.SIGINT)
    said, errors = running.communicate(timeout=60)
    assert running.returncode == 0
    assert errors.strip() == "stopping; Ctrl-C once more ends at once"
    found = json.loads((tmp_path / "ema_fix.json").read_text())["tunings"]
    assert {f"seed {one['seed']}" for one in found} == seen
    assert all(one["train"] for one in found)
    assert "wrote" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a file of train.tune"),
        ("[", "not a file of train.tune"),
        ('{"spec": 3}', "spec must be the name of a policy"),
        ('{"spec": "oracle_balance:truth=1.0"}', "oracle_balance is an oracle"),
        ('{"spec": "balance:luck=1"}', "no constant"),
    ],
)
def test_files_that_are_no_tunings_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tuned(str(path))
