"""Ctrl-C while worker processes run."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from ndp_gym.cli import run_command
from train.interrupts import processes

ROOT = Path(__file__).resolve().parent.parent


def touch_and_wait(path: Path, seconds: float) -> str:
    path.touch()
    time.sleep(seconds)
    return path.name


def test_what_was_asked_for_is_done(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    with processes(1) as pool:
        assert list(pool.map(touch_and_wait, paths, [0.0, 0.0])) == ["a", "b"]


def work(folder: str) -> int:
    """Two tasks on one process: the second has to wait."""
    tasks = [Path(folder) / "first", Path(folder) / "second"]

    def func(_: Namespace) -> int:
        with processes(1) as pool:
            list(pool.map(touch_and_wait, tasks, [60.0, 60.0]))
        return 0

    return run_command("work", Namespace(func=func))


def test_ctrl_c_ends_workers_without_a_word(tmp_path: Path) -> None:
    code = f"import sys; from tests.test_interrupts import work; sys.exit(work({str(tmp_path)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (tmp_path / "first").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")
    assert not (tmp_path / "second").exists()
