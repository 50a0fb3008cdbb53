"""A tuning is data: it names a built-in policy and its numbers, and never runs code of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies.tuned import SHIPPED, read_tuning, tuned


def write(path: Path, **content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_tuning_runs_no_file_and_no_module_that_it_names(tmp_path: Path) -> None:
    evil, ran = tmp_path / "evil.py", tmp_path / "ran"
    evil.write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    for spec in (
        f"{evil}:Mine",
        f"{evil}:Mine:bits=3",
        "os:abort",
        "policies.balance:Balance",
        "agent:path=mine",
        "balance:price='2'",
        "balance:price=True",
        "balance:price",
        "balance:price=" + "(" * 5000,
        ["balance"],
    ):
        path = write(tmp_path / "t.json", spec=spec)
        for read in (tuned, read_tuning):
            with pytest.raises(
                ValueError, match=r"t\.json: spec must be the name of a policy that is"
            ):
                read(path)
    assert not ran.exists()


def test_constants_are_those_of_the_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", spec="balance:price=2.5,moves=0")
    assert read_tuning(path)[1]["constants"] == {"price": 2.5, "moves": 0}
    path = write(tmp_path / "t.json", spec="balance:price=2.5", constants={"price": 3})
    with pytest.raises(ValueError, match="constants must be those of spec"):
        read_tuning(path)


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not a file of train"):
        tuned(str(tmp_path / "t"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_tuning_is_read(path: Path) -> None:
    constants = json.loads(path.read_text())["constants"]
    assert read_tuning(path.stem)[1]["constants"] == constants
    policy: Any = tuned(path.stem)
    assert policy.knobs.price == constants["price"]
