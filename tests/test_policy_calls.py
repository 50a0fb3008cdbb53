"""A policy that is wrong is named in one sentence, with what it raised still at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ndp_gym import cli
from ndp_gym.evaluation import evaluate
from ndp_gym.policy_calls import PolicyError
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM

WRONG = """
class NoReset:
    def __call__(self, observation):
        return None

class Three:
    def reset(self, context):
        pass

    def __call__(self, observation):
        return 3

class Missing(Three):
    def __call__(self, observation):
        return observation["no such key"]

class Refuses(Three):
    def reset(self, context):
        raise ValueError("alpha must be > 0")

class Divides(Three):
    def reset(self, context):
        self.rate = 1 / 0

class Unmade(Three):
    def __init__(self):
        self.load = undefined
"""
CASES = {
    "NoReset": "must have reset(context) and __call__(observation) -> Plan, "
    "but NoReset has no reset",
    "Three": "__call__ must return a Plan, got int 3",
    "Missing": "__call__ raised KeyError: 'no such key' (wrong.py, line 15)",
    "Refuses": "alpha must be > 0",
    "Divides": "reset raised ZeroDivisionError: division by zero (wrong.py, line 23)",
    "Unmade": "making it raised NameError: name 'undefined' is not defined (wrong.py, line 27)",
}


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_policy_is_one_sentence_and_exit_code_two(
    name: str, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = f"{wrong}:{name}"
    assert cli.main(["evaluate", "--policies", policy, "--max-windows", "1"]) == 2
    assert capsys.readouterr().err == f"ndp-gym: policy {policy!r}: {CASES[name]}\n".replace(
        "': must", "' must"
    )


def test_what_is_no_policy_at_all_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "os:getcwd", "ema", "--max-windows", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ndp-gym: policy 'os:getcwd' must have reset(context) and __call__")
    assert error.endswith("but str has no reset\n")


@pytest.mark.parametrize("name", ["all_far:bits=5", "ema:bits=4,far_bits=5", "all_far3:bits=abc"])
def test_a_width_that_is_asked_for_is_stored_or_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--policies", name, "--max-windows", "1"]) == 2
    error = capsys.readouterr().err
    assert "bits must be a width that h100_cxl_seed_ndp stores (16, 4, 3, 2, 1), got " in error
    assert error.count("\n") == 1


def test_widths_nobody_asked_for_may_be_the_nearest_and_averages_any_number() -> None:
    average = "mc_moe:bits=2.75"
    result = evaluate(
        ["monde", "all_far3"], make_trace(), MODEL, replace(SYSTEM, stored_bits=(4, 2))
    )
    rows = {row["policy"]: row for row in result.rows}
    assert rows["monde"]["mean_bits"] == 4.0
    assert rows["all_far4"]["mean_bits"] == 4.0
    assert rows["all_far3"]["validity"] == "infeasible"
    assert rows["all_far3"]["validity_reasons"] == ["3 bit is not stored by toy (4, 2 are)"]
    (row,) = (r for r in evaluate(average, max_windows=1) if r["policy"] == average)
    assert row["tokens_per_s"] is not None


def test_the_cause_stays_at_hand_in_python(wrong: Path) -> None:
    with pytest.raises(PolicyError, match="KeyError") as caught:
        evaluate(f"{wrong}:Missing", make_trace(), MODEL, SYSTEM)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_plan_that_does_not_fit_names_its_policy(tmp_path: Path) -> None:
    path = tmp_path / "wide.py"
    path.write_text(
        WRONG + "from tests.toy import plan_of\n"
        "class Wide(Three):\n"
        "    def __call__(self, observation):\n"
        "        return plan_of([[1] * 4] * 2, 3)\n"
    )
    with pytest.raises(PolicyError, match=r"wide\.py:Wide': bitwidth must be one of stored_bits"):
        evaluate(f"{path}:Wide", make_trace(), MODEL, SYSTEM)


COMPILED = """
class Slow:
    def reset(self, context):
        pass

    def __call__(self, observation):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:  # as CPython does where numba's dispatcher is stopped
            raise SystemError("CPUDispatcher returned a result with an exception set") from error
"""


def test_ctrl_c_in_compiled_code_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slow.py"
    path.write_text(COMPILED)
    assert cli.main(["evaluate", "--policies", f"{path}:Slow", "--max-windows", "1"]) == 130
    assert "Error" not in capsys.readouterr().err
    with monkeypatch.context() as patch:  # elsewhere than in a policy
        patch.setattr("ndp_gym.policy_calls.make", lambda *_: exec(COMPILED + "Slow()(0)", {}))
        assert cli.main(["evaluate", "--policies", "ema", "--max-windows", "1"]) == 130
    assert "Error" not in capsys.readouterr().err
