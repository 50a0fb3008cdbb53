"""How names become policies, and what is said about names that do not."""

import sys

import pytest

from ndp_gym.policy import resolve
from policies import POLICIES
from policies.all_far import AllFar
from policies.balance import Balance

MINE = """
from ndp_gym.plan import all_far

class Mine:
    def __init__(self, bits=4):
        self.bits = bits

    def reset(self, context):
        self.plan = all_far(context.model, context.system, self.bits)

    def __call__(self, observation):
        return self.plan
"""


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_registered_name_makes_a_policy(name):
    policy = resolve(name)()
    assert callable(policy)
    assert callable(policy.reset)
    assert type(policy).__doc__


def test_a_name_makes_a_fresh_policy_each_time():
    factory = resolve("ema")
    assert factory() is not factory()


def test_options_follow_the_name_and_win_over_those_of_the_entry():
    assert resolve("all_far3")().bits == 3
    assert resolve("all_far3:bits=2")().bits == 2
    assert resolve("policies.all_far:AllFar:bits=8")().bits == 8
    assert resolve("lru:scope=global,bits=3")().scope == "global"
    assert resolve("balance:hysteresis=0.5,floor=0.1")().knobs.hysteresis == 0.5


def test_module_and_attribute_name_a_policy():
    assert isinstance(resolve("policies.balance:Balance")(), Balance)
    assert isinstance(resolve("policies.all_far:AllFar")(), AllFar)


def test_a_file_names_a_policy(tmp_path):
    path = tmp_path / "my_policy.py"
    path.write_text(MINE)
    assert resolve(f"{path}:Mine")().bits == 4
    assert resolve(f"{path}:Mine:bits=2")().bits == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("balanse", r"policy 'balanse' is unknown: did you mean balance"),
        ("qqqq", r"known: .*all_far, all_far2"),
        ("my_policy", r"'my_policy' is unknown: known: "),
        (
            "policies.balance:Balanse",
            r"in policies.balance, policy 'Balanse' is unknown: did you mean Balance",
        ),
        ("no_such_module:X", r"policy module 'no_such_module' was not found"),
        ("policies.no_such:X", r"policy module 'policies.no_such' was not found"),
        ("examples/my_policy.py", r"is a file: add the class: examples/my_policy\.py:Name"),
        ("missing.py:X", r"policy file 'missing.py' was not found"),
        ("all_far:bitz=3", r"unexpected keyword argument 'bitz' \(options: bits\)"),
        ("all_far:bits=3,4", r"options must read key=value"),
        ("policies.balance:np", r"must name a class or a function, got module"),
    ],
)
def test_a_bad_name_gets_one_precise_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_an_unknown_constant_of_balance_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no constant \['hysteresi'\]; it has .*'hysteresis'"):
        resolve("balance:hysteresi=1")()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_library\n", "No module named 'no_such_library'"),
        ("x = = 1\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_not_reported_as_missing(tmp_path, monkeypatch, text, reason):
    (tmp_path / "broken_policy.py").write_text(text)
    with pytest.raises(ValueError, match=f"could not be loaded: .*{reason}"):
        resolve(f"{tmp_path / 'broken_policy.py'}:Mine")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"could not be loaded: .*{reason}"):
        resolve("broken_policy:Mine")


def test_bare_names_without_the_package_say_how_to_name_a_policy(monkeypatch):
    monkeypatch.setitem(sys.modules, "policies", None)
    with pytest.raises(
        ValueError, match=r"'policies' is not importable here: name it as module:attribute"
    ):
        resolve("balance")
