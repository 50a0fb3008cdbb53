"""`explain`: terms that add up, have a sign, and blame what differs."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import cli
from ndp_gym.explain import TERMS, explain, explain_task
from ndp_gym.inputs import DEFAULT_SYSTEM
from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import Observation, PolicyContext, resolve
from ndp_gym.quality import QualityModel
from ndp_gym.rollout import Task, run_policy
from ndp_gym.specs import SystemSpec
from tests.conftest import make_trace
from tests.toy import MODEL, SYSTEM, plan_of


def task_of(system: SystemSpec = SYSTEM, *, batch_size: int = 2) -> Task:
    return Task(
        trace=make_trace(),
        model=MODEL,
        system=system,
        batch_size=batch_size,
        window=4,
        hbm_budget=24_000,
        split="test",
        scheduling="continuous",
        quality=QualityModel(),
        quality_weight=4.0,
        max_windows=None,
        profile=None,
    )


class Fixed:
    """One plan in all windows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def reset(self, context: PolicyContext) -> None:
        pass

    def __call__(self, observation: Observation) -> Plan:
        return self.plan


class Alternating(Fixed):
    """Experts 0 and 1 in HBM, then 2 and 3, and so on."""

    def reset(self, context: PolicyContext) -> None:
        self.first = True

    def __call__(self, observation: Observation) -> Plan:
        self.first = not self.first
        return plan_of([[1, 1, 0, 0] if self.first else [0, 0, 1, 1]] * 2)


HALF_NEAR = [[0, 0, 1, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("names", [("balance", "lru"), ("ema", "all_far2"), ("lfu", "balance")])
def test_terms_sum_to_the_difference_exactly_and_change_sign_with_the_sides(
    names: tuple[str, str], batch_size: int
) -> None:
    task = task_of(batch_size=batch_size)
    found = explain_task(*names, task)
    assert tuple(found.terms) == TERMS
    assert sum(found.terms.values()) == found.difference != 0
    measured = [run_policy(resolve(name)(), task, seed=0) for name in names]
    expected = [Fraction(m.totals["decode_s"]) / int(m.totals["tokens"]) for m in measured]
    assert [found.a.s_per_token, found.b.s_per_token] == expected
    mirrored = explain_task(*names[::-1], task)
    assert mirrored.terms == {name: -value for name, value in found.terms.items()}


def test_what_differs_in_bits_only_is_all_bits() -> None:
    a, b = (plan_of(HALF_NEAR, bits) for bits in ([[8, 2, 4, 4], [4] * 4], 4))
    found = explain_task(Fixed(a), Fixed(b), task_of())
    assert found.terms["bits"] == found.difference != 0
    far = explain_task(Fixed(all_far(MODEL, SYSTEM, 2)), "all_far4", task_of())
    assert far.terms["bits"] == far.difference < 0


def test_what_differs_in_places_only_has_no_bits_and_nothing_waits() -> None:
    found = explain_task(Fixed(plan_of(HALF_NEAR)), "all_far4", task_of())
    assert found.terms["bits"] == found.terms["migration"] == found.terms["other"] == 0
    assert found.terms["hits"] < 0  # GPU reads are faster than far ones
    assert found.terms["link"] < 0  # fewer activations cross
    assert found.terms["overlap balance"] < 0  # the all-far side runs nothing in parallel


def test_same_policy_differs_in_nothing() -> None:
    assert set(explain_task("ema", "ema", task_of()).terms.values()) == {0}


def test_migration_is_what_waiting_costs() -> None:
    fixed = Fixed(plan_of([[0, 0, 1, 1]] * 2))
    slow = explain_task(Alternating(fixed.plan), fixed, task_of())
    assert slow.terms["migration"] > 0.02 * slow.b.s_per_token
    quick_link = replace(SYSTEM.link, bandwidth_bytes_per_s=1e12)
    quick = explain_task(Alternating(fixed.plan), fixed, task_of(replace(SYSTEM, link=quick_link)))
    share = quick.terms["migration"] / quick.b.s_per_token
    # copies arrive after one step of four at most
    assert 0 <= share < slow.terms["migration"] / slow.b.s_per_token


def test_requantisation_is_other() -> None:
    system = replace(SYSTEM, requantise=True)
    plans = [plan_of([[1, 1, 1, 1]] * 2, bits) for bits in (4, 2)]

    class Changing(Fixed):
        def __call__(self, observation: Observation) -> Plan:
            plans.reverse()
            return plans[0]

    task = task_of(system)
    found = explain_task(Changing(plans[0]), Fixed(all_far(MODEL, system, 4)), task)
    measured = run_policy(Changing(plans[0]), task, seed=0)
    first_s = 2 * 4 * 0.5e-3  # free at the first plan: part of the load
    assert measured.totals["requantise_s"] > first_s
    assert found.terms["other"] > 0
    assert sum(found.terms.values()) == found.difference


def test_infeasible_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="all experts need"):
        explain_task("all_hbm", "all_far4", replace(task_of(), hbm_budget=2000))


def test_baselines_need_no_registry() -> None:
    found = explain("all_hbm_mixed", "all_far4", make_trace(), MODEL, SYSTEM, hbm_budget=24_000)
    assert found.a.hit_rate == 1
    assert found.condition.startswith("tiny | toy on toy | batch 8")
    assert np.isclose(sum(found.to_dict()["terms_s_per_token"].values()), float(found.difference))


def test_help_names_the_system_that_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "--help"])
    assert f"(default: {DEFAULT_SYSTEM})" in " ".join(capsys.readouterr().out.split())


def test_command_prints_and_writes_the_waterfall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "small.safetensors", tmp_path / "why.json"
    make_trace(n_layers=8, n_experts=64, top_k=6, n_conversations=16).save(path)
    argv = ["explain", "balance", "all_far4", "--trace", str(path), "--model", "minimoe-16b"]
    assert cli.main([*argv, "--max-windows", "3", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(term in text for term in TERMS)
    assert "as fast as all_far4" in text
    assert json.loads(out.read_text())["a"]["policy"] == "balance"
    assert cli.main([*argv[:2], "all_farr", *argv[3:]]) == 2
