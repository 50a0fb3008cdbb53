"""Golden numbers: what every foundation policy costs on the bundled recording, to the last byte.

A change here is a change of the model or of a policy, wanted or not. `balance` and
`oracle_balance` choose by comparing sums of `expm1`, `log` and BLAS products, whose last bits
depend on the CPU, so two nearly equal plans may swap: their totals are compared with a tolerance
that such a swap stays within and a change of physics does not. All other policies decide by counts
and by elementwise arithmetic alone, which is the same everywhere.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ndp_gym.inputs import Inputs, combinations
from ndp_gym.policy import InfeasibleError, resolve
from ndp_gym.quality import QualityModel
from ndp_gym.reward import quality_weight
from ndp_gym.rollout import Measurement, Task, run_policy, train_profile

FOLDER = Path(__file__).parent / "golden"
BUDGETS = (0.05, 0.10, 0.20)
POLICIES = (
    "all_far", "all_far4", "all_far3", "all_far2", "all_hbm", "all_hbm_mixed", "balance",
    "context_aware", "ema", "hindsight_static", "lfu", "lru", "oracle_balance", "oracle_hot",
    "prefill_topk", "random", "static_popularity",
)  # fmt: skip
INTEGERS = (
    "tokens", "routed", "hits", "hbm_weight_bytes", "far_weight_bytes", "activation_bytes",
    "fetch_bytes", "migration_bytes", "wasted_bytes", "load_bytes", "n_repaired",
)  # fmt: skip
REALS = ("decode_s", "load_s", "requantise_s", "energy_j")
EXACT, PLAN_SWAPPED = 1e-9, 0.02
CHOOSE_BY_FLOATS = ("balance", "oracle_balance")
GIVEN = ("tokens", "routed", "n_repaired", "infeasible")  # the same whatever a policy chooses


@cache
def bundled() -> Inputs:
    return next(iter(combinations(None, None, None)))


def measured(policy: str, budget: float) -> Measurement:
    """12 windows of 8 slots, the default system, seed 0."""
    inputs = bundled()
    task = Task(
        trace=inputs.trace,
        model=inputs.model,
        system=inputs.system,
        batch_size=8,
        window=16,
        hbm_budget=budget,
        split="test",
        scheduling="continuous",
        quality=QualityModel(),
        quality_weight=quality_weight("balanced"),
        max_windows=12,
        profile=train_profile(inputs.trace),
    )
    return run_policy(resolve(policy)(), task, seed=0)


def numbers(policy: str, budget: float) -> dict[str, Any]:
    try:
        found = measured(policy, budget)
    except InfeasibleError as error:
        return {"infeasible": str(error)}
    exact = {name: int(found.totals[name]) for name in INTEGERS}
    served = {"served_hbm": found.served[0].tolist(), "served_far": found.served[1].tolist()}
    reals = {name: float(found.totals[name]) for name in REALS}
    return {**exact, **served, **reals, "delta_nll": float(found.loss.sum() / found.tokens.sum())}


def differences(policy: str, budget: str, now: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    found = []
    for name in sorted(now.keys() | golden.keys()):
        ours, wanted = now.get(name), golden.get(name)
        if policy in CHOOSE_BY_FLOATS and name not in GIVEN:
            scale = golden["routed"] if name.startswith("served") else None
            wanted = pytest.approx(wanted, rel=PLAN_SWAPPED, abs=scale and PLAN_SWAPPED * scale)
        elif isinstance(wanted, float):
            wanted = pytest.approx(wanted, rel=EXACT, abs=0)
        if ours != wanted:
            found.append(f"budget {budget}: {name} is {ours}, was {golden.get(name)}")
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_costs_what_it_did(policy: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{policy}.json"
    now: dict[str, Any] = {"trace_sha256": bundled().trace.sha256}
    now |= {f"{budget:.2f}": numbers(policy, budget) for budget in BUDGETS}
    if request.config.getoption("--regenerate"):
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        pytest.skip(f"wrote {path.name}; explain its diff in CHANGELOG.md under Model")
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert now["trace_sha256"] == golden["trace_sha256"], "the bundled recording is another one"
    moved = [
        line
        for budget in (f"{b:.2f}" for b in BUDGETS)
        for line in differences(policy, budget, now[budget], golden[budget])
    ]
    assert not moved, (
        f"{policy} costs something else than before:\n  " + "\n  ".join(moved) + "\n"
        "If that is meant, run `pytest tests/test_golden.py --regenerate` and explain the diff of "
        "tests/golden/ in CHANGELOG.md under Model."
    )


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(POLICIES)
