"""The package as a user meets it: quick to import, one program, one sentence per error."""

import argparse
import importlib
import subprocess
import sys

import gymnasium
import pytest

import ndp_gym
from ndp_gym import cli

HEAVY = ["numba", "torch", "stable_baselines3", "wandb", "matplotlib", "rich", "safetensors"]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("module", ["ndp_gym", "ndp_gym.presets", "ndp_gym.cli"])
def test_import_loads_no_heavy_package(module: str) -> None:
    program = f"import sys, {module}; print(*({HEAVY} & sys.modules.keys()))"
    result = run_python("-c", program.replace(str(HEAVY), f"set({HEAVY})"))
    assert result.stderr == ""
    assert result.stdout.split() == []


def test_importing_again_keeps_the_registered_environment() -> None:
    spec = gymnasium.spec(ndp_gym.ENV_ID)
    importlib.reload(ndp_gym)
    assert gymnasium.spec(ndp_gym.ENV_ID) is spec


@pytest.mark.parametrize("name", ndp_gym.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(ndp_gym, name) is not None
    assert name in dir(ndp_gym)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RoutingTraces'"):
        _ = ndp_gym.RoutingTraces


def test_module_runs_as_a_program() -> None:
    result = run_python("-m", "ndp_gym", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ndp-gym")
    assert run_python("-m", "ndp_gym", "--version").stdout.split() == [
        "ndp-gym",
        ndp_gym.__version__,
    ]


def test_bad_usage_is_one_sentence_and_exit_code_2() -> None:
    result = run_python("-m", "ndp_gym", "evaluat")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "evaluat" in result.stderr


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        ("evaluate --bound foo", "ndp-gym evaluate"),
        ("evaluate --nonsense", "ndp-gym evaluate"),
        ("trace info a.safetensors --nonsense", "ndp-gym trace info"),
        ("--nonsense list models", "ndp-gym"),
    ],
)
def test_arguments_that_nobody_knows_name_the_command(
    argv: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: unrecognized arguments: ")
    assert error.endswith(f"(see {program} --help)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("batch_size must be\n at least 1, got 0"), 2, "batch_size must be at least 1"),
        (
            FileNotFoundError(2, "No such file or directory", "x.safetensors"),
            2,
            "x.safetensors: No",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_error_becomes_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(func=fail)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    assert cli.main([]) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == (1 if message else 0)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = """
import argparse
from ndp_gym import cli

parser = argparse.ArgumentParser()
parser.set_defaults(func=lambda _: print("row\\n" * 100_000) or 0)
cli.build_parser = lambda: parser
raise SystemExit(cli.main([]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_defect_is_not_reported_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise KeyError("missing")

    parser = argparse.ArgumentParser()
    parser.set_defaults(func=fail)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    with pytest.raises(KeyError):
        cli.main([])
