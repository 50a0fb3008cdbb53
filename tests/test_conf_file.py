"""Options from YAML: the zoo's names, our environments, numbers as people write them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from train import imitate, ppo
from train.conf_file import PPO_ONLY
from train.options import parse
from train.setting import Setting
from train.tune import Args

RAND = str(Path(__file__).resolve().parent.parent / "train/experiments/rand.yml")


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--conf-file", str(path)]


def test_a_file_of_options_has_the_zoos_names_and_the_command_line_wins(tmp_path: Path) -> None:
    text = "policy: ema\nn_timesteps: 12\nenv_kwargs: {hbm_budget: 0.2, batch_size: 4}\n"
    file = write(tmp_path / "a.yml", text)
    args = parse(Args, [*file, "--window", "8", "--n-tunings", "2"], "")
    assert args == Args(
        policy="ema", n_windows=12, hbm_budget="0.2", batch_size=4, window=8, n_tunings=2
    )
    assert parse(Args, [*file, "--n-windows", "5"], "").n_windows == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_window: 3", "no option 'n_window'"),
        ("n_windows: many", "n_windows must be int, got 'many'"),
        ("n_windows: 1.5", "n_windows must be int, got 1.5"),
        ("policy: luck", "policy must be one of"),
        ("n_timesteps: many", "n_timesteps must be int, got 'many'"),
        ("n_windows: .inf", "n_windows must be int, got inf"),
        ("env_kwargs: {window: x}", "env_kwargs.window must be int, got 'x'"),
        ("window: 4\nenv_kwargs: {window: 8}", "env_kwargs.window is given twice, also as window"),
        ("env_kwargs: 3", "env_kwargs must be a map, got 3"),
        ("CartPole-v1: {seed: 1}", "id must be one of NDPPlacement-v0, NDPPlacementRand-v0, "),
        ("A: {seed: 1}\nB: {seed: 1}", "must be the options of one environment id alone, got A, B"),
        (
            "NDPPlacementRand-v0: {env_kwargs: {conditions: drift}}",
            "conditions must be those of NDPPlacementRand-v0, or be left out, got 'drift'",
        ),
        ("policy: MlpPolicy\nn_step: 3", "no option 'n_step'"),
        ("- 1", "must be a map of options"),
        ("a: [", "not YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_wrong_ends_in_one_sentence(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Args, write(tmp_path / "a.yml", text), "")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NDPPlacementRand-v0: {n_timesteps: 1000}", {"conditions": "rand", "n_windows": 1000}),
        ("NDPPlacement-v0: {env_kwargs: {conditions: hidden}}", {"conditions": "hidden"}),
        ("NDPPlacementDrift-v0: {env_kwargs: {conditions: drift}}", {"conditions": "drift"}),
        ("n_timesteps: 1e5\nlearning_rate: 1e-3", {"n_windows": 100_000, "learning_rate": 1e-3}),
        ("learning_rate: lin_2e-4", {"learning_rate": 2e-4}),
        ("env_kwargs: {window: 8}", {"window": 8}),
    ],
)
def test_what_files_say_of_environments_and_numbers(
    tmp_path: Path, text: str, found: dict[str, Any]
) -> None:
    assert parse(ppo.Args, write(tmp_path / "a.yml", text), "") == ppo.Args(**found)


def test_other_scripts_take_the_setting_alone_from_files_of_ppo() -> None:
    setting = {"conditions": "rand", "window": 16, "episode_windows": 64, "val_episodes": 16}
    assert parse(Args, ["--conf-file", RAND], "") == Args(**setting)
    assert parse(Args, ["--conf-file", RAND, "--policy", "ema"], "").policy == "ema"
    teacher = imitate.Args(**setting, base="balance_feedback_rand")
    assert parse(imitate.Args, ["--conf-file", RAND], "") == teacher
    names = {field.name for field in fields(ppo.Args)}
    assert names - {field.name for field in fields(Setting)} == PPO_ONLY
