"""Every example runs as its reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "gymnasium_loop.py": ["examples/gymnasium_loop.py"],
    "sb3_in_20_lines.py": ["examples/sb3_in_20_lines.py", "256"],
    "my_policy.py": [
        "-m", "ndp_gym", "evaluate", "--policies", "examples/my_policy.py:Recent",
        "--split", "val", "--max-windows", "4",
    ],
}  # fmt: skip
SHOWS = {"gymnasium_loop.py": "return", "sb3_in_20_lines.py": "unseen", "my_policy.py": "Recent"}


def test_every_example_has_a_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_example_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *RUNS[name]],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SHOWS[name] in done.stdout
