"""From measurements to result rows: rates, intervals, speed-ups and flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.quality import VALID_DELTA_NLL, accuracy_drop_points
from ndp_gym.results import (
    PLACEMENT_UNNECESSARY,
    Row,
    all_hbm_winner,
    better_all_hbm,
    row_of,
)
from ndp_gym.reward import reward
from ndp_gym.rollout import Measurement, Task
from ndp_gym.statistics import ConversationBootstrap, percentile_interval
from ndp_gym.trace_metadata import PHASES_RECORDED
from ndp_gym.trace_requests import MIN_SPLIT_CONVERSATIONS
from ndp_gym.uncertainty import Score

__all__ = ["Entry", "compare", "measured_row", "missing_row", "score_of"]

MIN_BLOCKS = 8  # blocks of conversations actually run below which no interval is given
FEW_BLOCKS = 16  # below which percentile intervals are noticeably too narrow
SEED_NDP, SEED_NDP_MAX_BATCH = "seed_ndp", 12  # docs/model.md section 8
LOW_MEAN_BITS = 1.5  # at or below which replay was not shown to hold, docs/quality.md
KAPPA_FORMAT = "mse_g128"  # with which the default kappa was fitted, docs/model.md section 6


@dataclass(kw_only=True, eq=False)
class Entry:
    """A row and the measurement behind it, ``None`` where nothing could be run."""

    row: Row
    measurement: Measurement | None


def measured_row(
    policy: str, measured: Measurement, task: Task, facts: dict[str, Any], seeds: list[int]
) -> Row:
    """The row of one policy, without what needs other rows (speed-ups, notes on winners)."""
    total = measured.totals
    steps = np.concatenate(measured.step_s)
    bits = np.asarray(task.system.stored_bits, np.float64)
    served = measured.served.sum(axis=0)
    loss = measured.loss.sum() / measured.tokens.sum()
    terms = {name: np.asarray(values) for name, values in measured.terms.items()}
    weights_read = total["hbm_weight_bytes"] + total["far_weight_bytes"]
    n_runs = measured.n_runs
    mean_bits = float((served * bits).sum() / served.sum())
    reasons, score = _doubts(mean_bits, loss, task), score_of(measured, task)
    per_run = {name: round(total[name] / n_runs) for name in _COUNTED}
    values: dict[str, Any] = dict(
        n_conversations=int((measured.tokens > 0).sum()),
        tokens_per_s=score.tokens_per_s,
        tokens_per_s_ci95=_interval(measured, task, "tokens", "seconds"),
        decode_step_p50_s=float(np.percentile(steps, 50)),
        decode_step_p99_s=float(np.percentile(steps, 99)),
        ttft_s=float(np.mean(measured.ttft_s)),
        load_s=total["load_s"] / n_runs,
        delta_nll_nats=float(loss),
        delta_nll_nats_ci95=_interval(measured, task, "loss", "tokens"),
        accuracy_drop_points=float(accuracy_drop_points(loss)),
        mean_bits=mean_bits,
        hit_rate=total["hits"] / total["routed"],
        byte_hit_rate=(total["hbm_weight_bytes"] - total["demanded_bytes"]) / weights_read,
        gpu_busy=total["gpu_busy_s"] / total["decode_s"],
        far_busy=total["far_busy_s"] / total["decode_s"],
        link_busy=total["link_busy_s"] / total["decode_s"],
        joules_per_token=total["energy_j"] / total["tokens"],
        reward=score.reward,
        reward_throughput=float(np.mean(terms["throughput"])),
        reward_quality=float(np.mean(terms["quality"])),
        requantise_s=total["requantise_s"] / n_runs,
        decision_ms=1e3 * float(np.mean(measured.decision_s)),
        gates=measured.gates,
        validity="extrapolated" if reasons else "in_range",
        validity_reasons=reasons,
        notes=_notes(measured, task),
        sees_future=measured.sees_future,
        hbm_budget_bytes=measured.min_budget_bytes,
        n_windows=round(total["n_windows"] / n_runs),
        n_tokens=round(total["tokens"] / n_runs),
        n_requests=len(measured.ttft_s) // n_runs,
        seeds=seeds,
    )
    return row_of(policy, {**values, **per_run, **facts})


def score_of(measured: Measurement, task: Task) -> Score:
    """Reward and tokens per second as the row has them."""
    terms = {name: np.asarray(values) for name, values in measured.terms.items()}
    return Score(
        reward=float(np.mean(reward(terms, task.quality_weight))),
        tokens_per_s=float(measured.tokens.sum() / measured.seconds.sum()),
    )


_COUNTED = (
    "activation_bytes", "fetch_bytes", "migration_bytes", "wasted_bytes", "load_bytes",
    "n_repaired",
)  # fmt: skip


def missing_row(policy: str, validity: str, reason: str, facts: dict[str, Any]) -> Row:
    """The row of a policy that could not be run: ``infeasible``, or ``n/a`` without a profile."""
    values: dict[str, Any] = {"gates": "", "notes": [], "seeds": [], "sees_future": False}
    values |= {"n_conversations": 0, "n_windows": 0, "n_tokens": 0, "n_requests": 0}
    values |= {"validity": validity, "validity_reasons": [reason]}
    return row_of(policy, {**values, **facts})


def compare(entries: list[Entry]) -> None:
    """Fill in speed-ups, and the note on placement, of all rows of one condition.

    Against ``all_far4``, and against the faster of the rows that need no far device.
    """
    by_name = {entry.row["policy"]: entry for entry in entries}
    far4 = by_name["all_far4"]
    best_hbm = better_all_hbm([entry.row for entry in entries])
    hbm = None if best_hbm is None else by_name[best_hbm["policy"]]
    for entry in entries:
        row = entry.row
        row["speedup_vs_all_far4"], row["speedup_vs_all_far4_ci95"] = _speedup(entry, far4)
        row["speedup_vs_all_hbm"], row["speedup_vs_all_hbm_ci95"] = _speedup(entry, hbm)
    winner = all_hbm_winner([entry.row for entry in entries])
    if winner is not None:
        winner["notes"].append(PLACEMENT_UNNECESSARY)


def _speedup(entry: Entry, base: Entry | None) -> tuple[float | None, tuple[float, float] | None]:
    """Ratio of tokens per second and its interval, paired by block of conversations."""
    if base is None or base.measurement is None or entry.measurement is None:
        return None, None
    ours, theirs = entry.row["tokens_per_s"], base.row["tokens_per_s"]
    assert ours is not None
    assert theirs is not None
    if entry.row["tokens_per_s_ci95"] is None:
        return ours / theirs, None
    size, rate = entry.row["batch_size"], ("tokens", "seconds")
    paired = _replicates(entry.measurement, size, *rate) / _replicates(
        base.measurement, size, *rate
    )
    return ours / theirs, percentile_interval(paired)


def _interval(
    measured: Measurement, task: Task, top: str, bottom: str
) -> tuple[float, float] | None:
    """95 % interval, or ``None``: evaluation-only recordings and very short runs have none."""
    too_few = task.trace.requests.n_conversations < MIN_SPLIT_CONVERSATIONS
    if too_few or _bootstrap(measured, task.batch_size).n_blocks < MIN_BLOCKS:
        return None
    return percentile_interval(_replicates(measured, task.batch_size, top, bottom))


def _bootstrap(measured: Measurement, batch_size: int) -> ConversationBootstrap:
    """Resamples of blocks; conversations that were never reached are not in the sample."""
    reached = int((measured.tokens > 0).sum())
    return ConversationBootstrap(n_conversations=reached, block_size=batch_size)


def _replicates(
    measured: Measurement, batch_size: int, top: str, bottom: str
) -> NDArray[np.float64]:
    """Bootstrap ratios of two sums over conversations."""
    reached = measured.tokens > 0
    return _bootstrap(measured, batch_size).ratios(
        getattr(measured, top)[reached], getattr(measured, bottom)[reached]
    )


def _doubts(mean_bits: float, loss: float, task: Task) -> list[str]:
    """Why a row lies outside what was validated."""
    reasons = []
    if mean_bits <= LOW_MEAN_BITS:
        reasons.append(
            f"mean bits <= {LOW_MEAN_BITS:g}: recorded routing does not react to quantization"
        )
    if loss > VALID_DELTA_NLL:
        reasons.append(f"ΔNLL > {VALID_DELTA_NLL} nats: outside the quality model")
    if not task.kappa_given and task.system.format.name != KAPPA_FORMAT:
        reasons.append(
            f"kappa {task.quality.kappa:g} of ΔNLL was fitted with {KAPPA_FORMAT}, "
            f"not {task.system.format.name}"
        )
    if task.system.far.name == SEED_NDP and task.batch_size > SEED_NDP_MAX_BATCH:
        reasons.append(
            f"{SEED_NDP} at batch > {SEED_NDP_MAX_BATCH}: its efficiency is a fit at batch 1"
        )
    return reasons


def _notes(measured: Measurement, task: Task) -> list[str]:
    """What a reader must know about the recording behind a row."""
    facts = task.trace.metadata
    notes = ["sees the future; not an upper bound"] if measured.sees_future else []
    if task.actual is not None:
        notes.append(f"runs on {task.actual.name}; policies are told {task.system.name}")
    if measured.gates != "recorded":
        notes.append(f"gate weights not recorded: {measured.gates}")
    if task.profile_source is not None:
        notes.append(f"popularity profile: {task.profile_source}")
    if facts.phases != PHASES_RECORDED:
        notes.append(facts.phases)
    if facts.tiled_from is not None:
        notes.append(f"layers tiled from {facts.tiled_from}")
    n_requests = len(task.trace.split_requests(task.split))
    if n_requests < task.batch_size:
        notes.append(f"only {n_requests} requests for {task.batch_size} slots: the others idle")
    return [*notes, *_interval_notes(measured, task)]


def _interval_notes(measured: Measurement, task: Task) -> list[str]:
    """How far the intervals of a row can be trusted, or why it has none."""
    n_blocks = _bootstrap(measured, task.batch_size).n_blocks
    n_recorded = task.trace.requests.n_conversations
    if n_recorded < MIN_SPLIT_CONVERSATIONS:
        return [
            f"no intervals: they need {MIN_SPLIT_CONVERSATIONS} conversations, the recording has "
            f"{n_recorded} (blocks of {task.batch_size} in the run: {n_blocks})"
        ]
    if n_blocks < MIN_BLOCKS:
        return [
            f"no intervals: they need {MIN_BLOCKS} blocks of {task.batch_size} conversations, "
            f"the run has {n_blocks}"
        ]
    if n_blocks < FEW_BLOCKS:
        return [f"intervals from {n_blocks} blocks of conversations: somewhat too narrow"]
    return []
