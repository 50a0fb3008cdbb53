"""`explain`: why one policy needs fewer seconds per token than another on the same recording.

The difference is taken apart by sequential substitution: the decode windows of both runs are
replayed by the simulator with one part of the plan of B exchanged for that of A at a time. B with
nothing to wait for, B's places at A's bitwidths, A's places at B's bitwidths, and A with nothing to
wait for stand between the two runs. Both orders of exchanging (bitwidths first, places first) are
averaged, as the Shapley value of two players does, so that explaining B by A gives the same
terms with the opposite sign. The terms:

- ``bits``: the whole change in time when only the bitwidths are exchanged;
- ``hits``, ``link``, ``overlap balance``: the change when tiers and service are exchanged, split
  into seconds of work on GPU and far device, seconds on the link, and seconds of all these that
  did not run in parallel;
  Where misses are fetched, a miss costs link seconds, so that worse hits appear as ``link``;
- ``migration``: what waiting for copies costs, the run itself minus the same plans served at once;
- ``other``: requantisation.

Sums are rational numbers, so that the terms add up to the difference exactly. A counterfactual
that pins more than the budget holds gets the bytes it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.batch import Simulator
from ndp_gym.budget import HbmBudget
from ndp_gym.contenders import Contender, PolicyLike, all_far4, all_hbm_rows, contenders
from ndp_gym.cost import expert_bytes
from ndp_gym.importers.popularity import ProfileLike, profile_for
from ndp_gym.inputs import ModelLike, QualityLike, SystemLike, TraceLike, combinations, find_quality
from ndp_gym.memory import gate_profile
from ndp_gym.outcome import Outcome
from ndp_gym.packing import window_arrays
from ndp_gym.plan import FAR, HBM
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.rollout import Measurement, Replayed, Task, run_policy
from ndp_gym.schedule import Scheduling
from ndp_gym.specs import Service

__all__ = ["TERMS", "Explanation", "Side", "contender_of", "explain", "explain_task"]

TERMS = ("bits", "hits", "overlap balance", "link", "migration", "other")

Progress = Callable[[str, int, int], None]


class Side(NamedTuple):
    """One of the two policies: its name and what it did.

    ``delta_nll_nats`` is per token, ``mean_bits`` per routed token.
    """

    policy: str
    s_per_token: Fraction
    delta_nll_nats: float
    hit_rate: float
    mean_bits: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Seconds per token of A minus those of B, by cause; negative terms make A faster.

    Attributes:
        condition: recording, model, system, batch size and window, in words.
        a, b: the two policies.
        terms: seconds per token, in the order of `TERMS`; they sum to the difference exactly.
        n_tokens: decoded tokens of each run.
    """

    condition: str
    a: Side
    b: Side
    terms: dict[str, Fraction]
    n_tokens: int

    @property
    def difference(self) -> Fraction:
        """Seconds per token of A minus those of B."""
        return self.a.s_per_token - self.b.s_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, in seconds per token."""
        sides = {
            name: {**side._asdict(), "s_per_token": float(side.s_per_token)}
            for name, side in (("a", self.a), ("b", self.b))
        }
        return {
            "condition": self.condition,
            **sides,
            "difference_s_per_token": float(self.difference),
            "terms_s_per_token": {name: float(value) for name, value in self.terms.items()},
            "n_tokens": self.n_tokens,
        }


def explain(
    a: PolicyLike,
    b: PolicyLike,
    trace: TraceLike = None,
    model: ModelLike = None,
    system: SystemLike = None,
    *,
    batch_size: int = 8,
    window: int = 16,
    hbm_budget: HbmBudget = 0.10,
    split: str = "test",
    scheduling: Scheduling = "continuous",
    quality_weight: str | float = "balanced",
    quality: QualityLike = None,
    profile: ProfileLike | None = None,
    max_windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Why ``a`` is faster (or slower) than ``b``; arguments as for `ndp_gym.evaluate`.

    Policies that draw random numbers run once, with ``seed``.

    Raises:
        ValueError: unknown names, a recording and a model that disagree, a budget that does not
            fit, or a policy that is infeasible here.
    """
    inputs = next(iter(combinations(trace, model, system)))
    task = Task(
        trace=inputs.trace,
        model=inputs.model,
        system=inputs.system,
        batch_size=batch_size,
        window=window,
        hbm_budget=hbm_budget,
        split=split,
        scheduling=scheduling,
        quality=find_quality(quality, inputs.model, inputs.system),
        quality_weight=weight_of(quality_weight),
        max_windows=max_windows,
        profile=profile_for(profile, inputs.trace, inputs.model)[0],
    )
    condition = (
        f"{inputs.label} | {task.model.name} on {task.system.name} | "
        f"batch {batch_size}, window {window}"
    )
    return explain_task(a, b, task, condition, seed=seed, progress=progress)


def explain_task(
    a: PolicyLike,
    b: PolicyLike,
    task: Task,
    condition: str = "",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """`explain` for a ready-made task."""
    runs = [_run(contender_of(policy, task), task, seed, progress) for policy in (a, b)]
    (ours, theirs), (windows_a, windows_b) = [r.measured for r in runs], [r.windows for r in runs]
    sums = _counterfactuals(task, windows_a, windows_b)
    n_tokens = int(ours.totals["tokens"])
    assert n_tokens == theirs.totals["tokens"], "both runs decode the same requests"
    steps_a, steps_b = (Fraction(run.steps_s) for run in runs)
    terms = _plan_terms(sums)
    terms["migration"] = (steps_a - sums[_A].time) - (steps_b - sums[_B].time)
    total_a, total_b = (Fraction(m.totals["decode_s"]) for m in (ours, theirs))
    terms["other"] = (total_a - steps_a) - (total_b - steps_b)
    return Explanation(
        condition=condition,
        a=_side(runs[0], task),
        b=_side(runs[1], task),
        terms={name: terms[name] / n_tokens for name in TERMS},
        n_tokens=n_tokens,
    )


class _Run(NamedTuple):
    name: str
    measured: Measurement
    windows: list[Replayed]
    steps_s: float


class _Sums(NamedTuple):
    """Seconds of one counterfactual: all steps; work on GPU and far device; link."""

    time: Fraction
    work: Fraction
    link: Fraction


_B, _BITS_OF_A, _PLACES_OF_A, _A = range(4)  # the counterfactuals, each a lane


def _plan_terms(sums: list[_Sums]) -> dict[str, Fraction]:
    """The terms that differences between plans cause, mean of the two orders of exchange."""
    half = Fraction(1, 2)
    bits_first = sums[_BITS_OF_A].time - sums[_B].time
    bits_last = sums[_A].time - sums[_PLACES_OF_A].time
    changes = {}
    for name in ("time", "work", "link"):
        b, bits, places, a = (getattr(s, name) for s in sums)
        changes[name] = half * ((a - bits) + (places - b))
    return {
        "bits": half * (bits_first + bits_last),
        "hits": changes["work"],
        "link": changes["link"],
        "overlap balance": changes["time"] - changes["work"] - changes["link"],
    }


def _run(contender: Contender, task: Task, seed: int, progress: Progress | None) -> _Run:
    windows: list[Replayed] = []
    report = None if progress is None else lambda done, n: progress(contender.name, done, n)
    measured = run_policy(
        contender.make(),
        task,
        seed=seed,
        name=contender.name,
        progress=report,
        watch=windows.append,
    )
    steps_s = sum(float(w.outcome.step_s.sum()) for w in windows)
    return _Run(contender.name, measured, windows, steps_s)


def contender_of(policy: PolicyLike, task: Task) -> Contender:
    """A policy by name, the baselines of `ndp_gym.evaluate` among them."""
    found = contenders(policy)
    if found:
        return found[0]
    far = all_far4()
    if policy == far.name:
        return far
    smallest = run_policy(far.make(), task, seed=0).min_budget_bytes
    return next(c for c in all_hbm_rows(smallest, task.profile) if c.name == policy)


def _side(run: _Run, task: Task) -> Side:
    totals, served = run.measured.totals, run.measured.served.sum(axis=0)
    bits = np.asarray(task.system.stored_bits, np.float64)
    return Side(
        policy=run.name,
        s_per_token=Fraction(totals["decode_s"]) / int(totals["tokens"]),
        delta_nll_nats=float(run.measured.loss.sum() / run.measured.tokens.sum()),
        hit_rate=totals["hits"] / totals["routed"],
        mean_bits=float((served * bits).sum() / served.sum()),
    )


def _counterfactuals(task: Task, a: list[Replayed], b: list[Replayed]) -> list[_Sums]:
    """Replay every window under the four plans in which nothing waits for a copy."""
    system = task.actual or task.system
    simulator = Simulator(task.model, system, task.quality, n_lanes=4)
    simulator.state.scalars[:, 3] = 0  # not fresh: copies are simply there
    size_of = np.zeros(17, np.int64)
    for bits in system.stored_bits:
        size_of[bits] = expert_bytes(task.model, system.format, bits)
    profile, _ = gate_profile(task.trace, task.model)
    sums = np.zeros((3, 4))
    for ours, theirs in zip(a, b, strict=True):
        outcome = _replay(simulator, task, profile, size_of, ours, theirs)
        sums[0] += outcome.step_s.sum(axis=1)
        sums[1] += (outcome.gpu_s + outcome.far_s).sum(axis=1)
        sums[2] += outcome.link_s.sum(axis=1)
    return [_Sums(*(Fraction(float(v)) for v in column)) for column in sums.T]


def _replay(
    simulator: Simulator,
    task: Task,
    profile: NDArray[np.float64],
    size_of: NDArray[np.int64],
    ours: Replayed,
    theirs: Replayed,
) -> Outcome:
    """One window of the four counterfactual lanes."""
    assert np.array_equal(ours.first_row, theirs.first_row), "both runs replay the same rows"
    places = [theirs, theirs, ours, ours]
    widths = [theirs, ours, theirs, ours]
    tier = np.stack([np.where(r.wanted != 0, HBM, FAR) for r in places]).astype(np.uint8)
    bits = np.stack([r.plan.placement.bitwidth for r in widths])
    pinned = np.where(tier == HBM, bits, 0).astype(np.uint8)
    simulator.state.hbm[:] = pinned.reshape(4, -1)
    charge = size_of[pinned].sum(axis=(1, 2))
    default = (task.actual or task.system).default_service
    services: list[Service] = [r.plan.service or default for r in places]
    lanes = np.ones((4, 1), np.int64)
    windows = window_arrays(
        task.trace.expert_ids,
        task.trace.gate_weights,
        profile,
        *(lanes * rows for rows in (ours.first_row, ours.n_rows, ours.context)),
    )
    return simulator.advance(
        tier=tier,
        bits=bits,
        order=np.zeros(tier.shape),
        services=services,
        windows=windows,
        length=task.window,
        budgets=np.maximum(charge, [r.budget_bytes for r in places]),
    )
