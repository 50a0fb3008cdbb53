"""What an evaluation hands out: rows with public field names, and what follows from rows alone.

Rows are plain dictionaries, ready for JSON, CSV and data frames. Field names are public: add, never
rename. Nothing here runs a simulation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, cast

from ndp_gym.uncertainty import Study

__all__ = ["QUALITY_BUDGETS", "AtQuality", "Condition", "EvaluationResult", "Row", "pareto_front"]

QUALITY_BUDGETS = (0.01, 0.03, 0.1)  # nats, assumed
ALL_HBM_POLICIES = ("all_hbm", "all_hbm_mixed")
ALL_FAR4 = "all_far4"
BASELINES = (ALL_FAR4, *ALL_HBM_POLICIES)
MODELED = "modeled, not measured"
PLACEMENT_UNNECESSARY = "placement unnecessary here"


class Row(TypedDict):
    """One policy under one condition; ``None`` where a value does not exist.

    Suffixes are units, shares lie in [0, 1], ``*_ci95`` are (low, high), resampled by blocks of
    conversations that decoded together and ``None`` below 8 blocks. Rates pool all decode
    steps; prefill and the first load are in ``ttft_s`` only, which starts when a slot is free.
    Bytes, ``load_s``, ``requantise_s`` and ``n_*`` are totals of one run. ``reward`` and its two
    terms are means over windows, as an agent collects them; ``reward_quality`` is not yet
    weighted. ``byte_hit_rate`` is the share of expert-weight bytes read from copies that were in
    HBM already; what was fetched for the step counts as a miss. ``hbm_budget_bytes`` is the
    smallest of the run.

    ``reward_bound`` is a proved upper bound (`ndp_gym.bound`) of the mean reward over the row's
    windows for any plans with the kinds of service it used, and ``regret`` what is missing to it;
    ``reward_bound_any_service`` holds for every row without prefetch. ``None`` where not asked
    for; rows that prefetch have no bound and no regret.

    ``order_flips_with`` names the policies whose order with this one (by reward) is not the same
    all over the ranges of ``uncertainty``; ``None`` where that was not asked for.

    ``validity`` is ``"in_range"``, ``"extrapolated"``, ``"infeasible"`` (over the HBM budget) or
    ``"n/a"`` (needs a train split that the recording lacks), with ``validity_reasons``.
    """

    policy: str
    trace: str
    model: str
    system: str
    batch_size: int
    window: int
    n_conversations: int
    tokens_per_s: float | None
    tokens_per_s_ci95: tuple[float, float] | None
    decode_step_p50_s: float | None
    decode_step_p99_s: float | None
    ttft_s: float | None
    load_s: float | None
    speedup_vs_all_far4: float | None
    speedup_vs_all_far4_ci95: tuple[float, float] | None
    speedup_vs_all_hbm: float | None
    speedup_vs_all_hbm_ci95: tuple[float, float] | None
    delta_nll_nats: float | None
    delta_nll_nats_ci95: tuple[float, float] | None
    accuracy_drop_points: float | None
    mean_bits: float | None
    hit_rate: float | None
    byte_hit_rate: float | None
    activation_bytes: int | None
    fetch_bytes: int | None
    migration_bytes: int | None
    wasted_bytes: int | None
    load_bytes: int | None
    gpu_busy: float | None
    far_busy: float | None
    link_busy: float | None
    joules_per_token: float | None
    reward: float | None
    reward_throughput: float | None
    reward_quality: float | None
    reward_bound: float | None
    regret: float | None
    reward_bound_any_service: float | None
    n_repaired: int | None
    requantise_s: float | None
    decision_ms: float | None
    gates: str
    validity: str
    validity_reasons: list[str]
    notes: list[str]
    sees_future: bool
    split: str
    scheduling: str
    hbm_budget_bytes: int | None
    quality_weight: float
    n_requests: int
    n_windows: int
    n_tokens: int
    seeds: list[int]
    order_flips_with: list[str] | None
    commit: str | None
    env_id: str
    env_spec: str
    trace_sha256: str
    versions: str


def row_of(policy: str, values: Mapping[str, Any]) -> Row:
    """A row with all fields in their public order, ``None`` where ``values`` has none.

    Raises:
        ValueError: ``values`` names a field that rows do not have.
    """
    unknown = values.keys() - Row.__annotations__.keys()
    if unknown:
        raise ValueError(f"rows have no fields {sorted(unknown)}")
    row = {name: values.get(name) for name in Row.__annotations__}
    row["policy"] = policy
    return cast(Row, row)


class AtQuality(TypedDict):
    """The throughput of one policy (or family ``name*``, or ``best``) within a quality budget."""

    policy: str
    trace: str
    model: str
    system: str
    batch_size: int
    window: int
    delta_nll_budget: float
    tokens_per_s: float | None
    achieved_by: str | None


class Condition(NamedTuple):
    """What two rows must share to be compared."""

    trace: str
    model: str
    system: str
    batch_size: int
    window: int

    @classmethod
    def of(cls, row: Row | AtQuality | Study) -> Condition:
        """The condition of ``row``."""
        return cls(row["trace"], row["model"], row["system"], row["batch_size"], row["window"])

    def __str__(self) -> str:
        """One line, as titles show it."""
        return (
            f"{self.trace} | {self.model} on {self.system} | batch {self.batch_size}, "
            f"window {self.window}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Rows, throughput at quality budgets, and where they come from. Iterates over its rows.

    Attributes:
        rows: one per policy and condition, in the order they were asked for.
        at_quality: throughput where ΔNLL stays within each budget of ``QUALITY_BUDGETS``.
        provenance: command, commit, versions, error model, specs, trace digests, seeds.
        uncertainty: one study per condition, where asked for.
    """

    rows: Sequence[Row]
    at_quality: Sequence[AtQuality] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: Sequence[Study] = ()

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Count of rows."""
        return len(self.rows)

    def by_condition(self) -> dict[Condition, list[Row]]:
        """Rows grouped by what makes them comparable: the baselines, then by falling reward."""
        groups: dict[Condition, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(Condition.of(row), []).append(row)
        return {condition: _ranked(rows) for condition, rows in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of ``ndp-gym evaluate --json``."""
        return {
            "rows": list(self.rows),
            "at_quality": list(self.at_quality),
            "provenance": dict(self.provenance),
            "uncertainty": list(self.uncertainty),
        }


def at_quality(rows: Sequence[Row], budgets: Sequence[float] = QUALITY_BUDGETS) -> list[AtQuality]:
    """Throughput within each ΔNLL budget: per policy, per family of variants, and the best.

    ``best`` is the best policy that does not see the future.

    A policy over the budget gets ``None``: nothing is interpolated between rows, because a mix of
    two policies is a policy that nobody ran. Variants share a name up to trailing digits or
    options (``all_far3`` and ``all_far4`` make ``all_far*``).

    Args:
        rows: rows of one condition.
        budgets: in nats.
    """
    found: list[AtQuality] = []
    for budget in budgets:
        for label, members in _families(rows).items() if rows else ():
            within = [r for r in members if _within(r, budget)]
            best = max(within, key=lambda r: r["tokens_per_s"] or 0.0, default=None)
            trace, model, system, batch_size, window = Condition.of(rows[0])
            found.append(
                AtQuality(
                    policy=label,
                    trace=trace,
                    model=model,
                    system=system,
                    batch_size=batch_size,
                    window=window,
                    delta_nll_budget=budget,
                    tokens_per_s=None if best is None else best["tokens_per_s"],
                    achieved_by=None if best is None else best["policy"],
                )
            )
    return found


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Baselines in their order, then the highest reward first, rows without one last."""

    def key(row: Row) -> tuple[bool, float]:
        if row["policy"] in BASELINES:
            return False, 0.0
        return True, float("inf") if row["reward"] is None else -row["reward"]

    return sorted(rows, key=key)


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats in both tokens per second and ΔNLL, by rising ΔNLL.

    Policies that see the future are left out.
    """
    known = [
        row
        for row in rows
        if row["tokens_per_s"] is not None
        and row["delta_nll_nats"] is not None
        and not row["sees_future"]
    ]
    known.sort(key=lambda r: (r["delta_nll_nats"] or 0.0, -(r["tokens_per_s"] or 0.0)))
    front: list[Row] = []
    for row in known:
        if not front or (row["tokens_per_s"] or 0.0) > (front[-1]["tokens_per_s"] or 0.0):
            front.append(row)
    return front


def all_hbm_winner(rows: Sequence[Row]) -> Row | None:
    """The all-in-HBM row of a condition if no policy that can be built has a higher reward.

    Policies that see the future are left out. ``None`` where placement wins.

    The reward weighs speed against quality, so a row that is fast only because it dropped nearly
    all bits does not win.
    """
    known = [r for r in rows if r["reward"] is not None and not r["sees_future"]]
    best = max(known, key=lambda r: r["reward"] or 0.0, default=None)
    return best if best is not None and best["policy"] in ALL_HBM_POLICIES else None


def better_all_hbm(rows: Sequence[Row]) -> Row | None:
    """The faster of the feasible all-in-HBM rows of a condition, or ``None``."""
    known = [r for r in rows if r["policy"] in ALL_HBM_POLICIES and r["tokens_per_s"] is not None]
    return max(known, key=lambda r: r["tokens_per_s"] or 0.0, default=None)


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> rows: every policy, every family with at least two members, and all as ``best``."""
    single = {row["policy"]: [row] for row in rows}
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(re.sub(r"(:[^:]*=.*|\d+)$", "", row["policy"]), []).append(row)
    shared = {f"{name}*": members for name, members in families.items() if len(members) > 1}
    return {**single, **shared, "best": [r for r in rows if not r["sees_future"]]}


def _within(row: Row, budget: float) -> bool:
    loss = row["delta_nll_nats"]
    return loss is not None and row["tokens_per_s"] is not None and loss <= budget
