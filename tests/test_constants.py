"""Constants of the planner are refused where they mean nothing, by name, rule and value."""

from dataclasses import fields
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from ndp_gym.forecast import Blend
from ndp_gym.planners import Knobs
from policies.balance import Balance
from train.tune import RANGES

POSITIVE, NOT_NEGATIVE, SHARE = "finite and > 0", "finite and >= 0", r"in 0\.\.1"
REFUSED = [
    *((name, POSITIVE, (0, -1, inf)) for name in ("gpu_factor", "far_factor", "price")),
    *(
        (name, NOT_NEGATIVE, (-0.1, inf))
        for name in ("hysteresis", "migration_cap", "min_gain", "prefill_tokens", "intensity")
    ),
    ("moves", "0 or 1", (2, 0.5, -1)),
    *((name, SHARE, (-0.1, 1.1, 7)) for name in ("decay", "floor", "gates")),
]


@pytest.mark.parametrize(("name", "rule", "values"), REFUSED)
def test_constants_that_mean_nothing_are_refused(
    name: str, rule: str, values: tuple[Any, ...]
) -> None:
    for value in (*values, nan, "much", None, [1.0]):
        with pytest.raises(ValueError, match=f"{name} must be {rule}, got "):
            Balance(**{name: value})


def test_every_constant_has_a_rule_that_allows_what_tunings_try() -> None:
    of_planner = {f.name for kind in (Knobs, Blend) for f in fields(kind)}
    assert {name for name, _, _ in REFUSED} == of_planner
    for place in (0.0, 0.5, 1.0):
        for policy in ("balance", "balance_feedback"):
            tried = {n: r.value(place) for n, r in RANGES[policy].items() if n in of_planner}
            assert Balance(**tried).knobs.price == tried["price"]
    assert Balance(price=np.float32(2), moves=np.int64(0)).knobs.moves == 0
