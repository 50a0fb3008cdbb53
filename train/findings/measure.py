"""One condition, measured: all rows, who wins at equal quality, by how much, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ndp_gym.cost import check_capacity
from ndp_gym.evaluation import evaluate
from ndp_gym.explain import Explanation, explain_task
from ndp_gym.inputs import combinations
from ndp_gym.policy import resolve
from ndp_gym.quality import QualityModel
from ndp_gym.results import Row
from ndp_gym.reward import quality_weight
from ndp_gym.rollout import Measurement, Task, run_policy, train_profile
from ndp_gym.statistics import ConversationBootstrap, percentile_interval
from policies import POLICIES
from train.findings.controls import CONTROLS, control

SYSTEMS = ("h100_cxl_seed_ndp", "h100_cxl_pnm", "cpu_epyc_9355_rtx5090")
BATCH_SIZES = (1, 4, 16)
BUDGETS = (0.03, 0.1)  # nats
WINDOW, HBM_BUDGET = 16, 0.10
SEEDS = (0, 1, 2)  # of policies that draw random numbers
OPTIONS = {
    "all_far": ("bits=3",),
    "balance": ("price=0.25", "price=0.5", "price=2"),
    "oracle_balance": ("price=0.25", "price=0.5", "price=2"),
    "context_aware": ("bits=3.5", "bits=4"),
    "lru": ("bits=3",),
    "lfu": ("bits=3",),
    **dict.fromkeys(
        ("ema", "prefill_topk", "static_popularity", "random", "hindsight_static", "oracle_hot"),
        ("far_bits=3", "bits=3,far_bits=3", "bits=3"),
    ),
}
BY_PROMPTS = ("prefill_topk", "context_aware")
HBM_ROWS = ("all_hbm", "all_hbm_mixed")
ALWAYS_THERE = ("all_far4", *HBM_ROWS)
# what was trained or tuned competes in results of its own; where machines are as told, feedback
# is plain `balance`
SCREENED = ("agent", "tuned", "balance_feedback", "all_far", "all_far2", "all_far3", *ALWAYS_THERE)

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Tokens per second of one policy over another, and ΔNLL of the first minus the second."""

    value: float
    ci95: Interval | None
    nats: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who is fastest within one quality budget.

    Attributes:
        budget: ΔNLL in nats.
        winner: the fastest row that does not see the future, ``None`` where none is good enough.
        runner: the fastest one of another policy.
        lead: winner over runner.
        why: what the lead is made of.
        oracle: the fastest row that sees the future.
        hbm: the faster all-in-HBM row, whatever its quality.
    """

    budget: float
    winner: Row | None
    runner: Row | None
    lead: Ratio | None
    why: Explanation | None
    oracle: Row | None
    hbm: Row | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything about one condition; ``problem`` says why there is nothing.

    Attributes:
        rows: of policies, without controls.
        verdicts: one per quality budget.
        prefill: by (policy, control): a policy that places by prompts over the same policy that is
            shown something else (`CONTROLS`), and `prefill_topk` over `static_popularity`.
    """

    title: str
    system: str
    batch_size: int
    problem: str | None = None
    rows: tuple[Row, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    prefill: Mapping[tuple[str, str], Ratio] = field(default_factory=dict)


def family(name: str) -> str:
    """`ema:bits=3` -> `ema`, `all_far4` -> `all_far`."""
    return re.sub(r"\d+$", "", name.partition(":")[0])


def variants() -> list[str]:
    """Every registered policy, and variants that trade quality for speed in the same way."""
    names = ["all_far:bits=3", *(name for name in POLICIES if name not in SCREENED)]
    return names + [f"{name}:{options}" for name in names for options in OPTIONS.get(name, ())]


def measure(title: str, path: Path, system: str, batch_size: int, windows: int) -> Found:
    """All rows of one condition and what follows from them."""
    task = task_of(path, system, batch_size, windows)
    try:
        check_capacity(task.model, task.system)
    except ValueError as error:
        return Found(title=title, system=system, batch_size=batch_size, problem=str(error))
    all_rows = evaluate(
        [*variants(), *_controls()],
        task.trace,
        task.model,
        task.system,
        batch_sizes=(batch_size,),
        window=WINDOW,
        hbm_budget=HBM_BUDGET,
        max_windows=windows,
        seeds=SEEDS,
    ).rows
    rows = [row for row in all_rows if row["policy"] not in _controls()]
    compare = _comparison(task, has_intervals=rows[0]["tokens_per_s_ci95"] is not None)
    return Found(
        title=title,
        system=system,
        batch_size=batch_size,
        rows=tuple(rows),
        verdicts=tuple(_verdict(rows, budget, task, compare) for budget in BUDGETS),
        prefill=_prefill(all_rows, compare),
    )


@cache
def task_of(path: Path, system: str, batch_size: int, windows: int) -> Task:
    """The task behind a condition."""
    inputs = next(iter(combinations(path, None, system)))
    return Task(
        trace=inputs.trace,
        model=inputs.model,
        system=inputs.system,
        batch_size=batch_size,
        window=WINDOW,
        hbm_budget=HBM_BUDGET,
        split="test",
        scheduling="continuous",
        quality=QualityModel(),
        quality_weight=quality_weight("balanced"),
        max_windows=windows,
        profile=train_profile(inputs.trace),
    )


def within(rows: Sequence[Row], budget: float) -> list[Row]:
    """Rows whose loss is within ``budget`` nats, fastest first."""
    good = [
        row
        for row in rows
        if row["tokens_per_s"] is not None
        and row["delta_nll_nats"] is not None
        and row["delta_nll_nats"] <= budget
    ]
    return sorted(good, key=_speed, reverse=True)


def _speed(row: Row) -> float:
    return row["tokens_per_s"] or 0.0


Compare = Callable[[Row, Row], Ratio]


def _comparison(task: Task, *, has_intervals: bool) -> Compare:
    """A function that divides two rows' speeds, with a paired interval where rows have one."""

    @cache
    def run(name: str, seeds: tuple[int, ...]) -> Measurement:
        first, *others = (run_policy(resolve(name)(), task, seed=seed) for seed in seeds)
        for other in others:
            first.add(other)
        return first

    def compare(ours: Row, theirs: Row) -> Ratio:
        value, ci95 = _speed(ours) / _speed(theirs), None
        if has_intervals and not {ours["policy"], theirs["policy"]} & {*HBM_ROWS}:
            runs = (run(row["policy"], tuple(row["seeds"])) for row in (ours, theirs))
            ci95 = _paired(*runs, batch_size=task.batch_size)
        nats = (ours["delta_nll_nats"] or 0.0) - (theirs["delta_nll_nats"] or 0.0)
        return Ratio(value=value, ci95=ci95, nats=nats)

    return compare


def _paired(ours: Measurement, theirs: Measurement, *, batch_size: int) -> Interval:
    """95 % interval of the ratio of tokens per second, both resampled alike."""
    reached = ours.tokens > 0
    bootstrap = ConversationBootstrap(n_conversations=int(reached.sum()), block_size=batch_size)
    speeds = [bootstrap.ratios(m.tokens[reached], m.seconds[reached]) for m in (ours, theirs)]
    low, high = percentile_interval(np.divide(*speeds))
    return low, high


def _verdict(rows: Sequence[Row], budget: float, task: Task, compare: Compare) -> Verdict:
    fair = within([row for row in rows if not row["sees_future"]], budget)
    oracles = within([row for row in rows if row["sees_future"]], budget)
    hbm = [r for r in rows if r["policy"] in HBM_ROWS and r["tokens_per_s"] is not None]
    winner = fair[0] if fair else None
    others = [row for row in fair if family(row["policy"]) != family(fair[0]["policy"])]
    runner = others[0] if others else None
    lead, why = None, None
    if winner is not None and runner is not None:
        lead = compare(winner, runner)
        why = explain_task(winner["policy"], runner["policy"], task)
    return Verdict(
        budget=budget,
        winner=winner,
        runner=runner,
        lead=lead,
        why=why,
        oracle=oracles[0] if oracles else None,
        hbm=max(hbm, key=_speed, default=None),
    )


def _controls() -> list[str]:
    return [control(policy, kind) for policy in BY_PROMPTS for kind in CONTROLS]


def _prefill(rows: Sequence[Row], compare: Compare) -> dict[tuple[str, str], Ratio]:
    by_name = {row["policy"]: row for row in rows if row["tokens_per_s"] is not None}
    pairs = {(p, kind): (p, control(p, kind)) for p in BY_PROMPTS for kind in CONTROLS}
    pairs["prefill_topk", "static_popularity"] = ("prefill_topk", "static_popularity")
    return {
        key: compare(by_name[ours], by_name[theirs])
        for key, (ours, theirs) in pairs.items()
        if ours in by_name and theirs in by_name
    }
