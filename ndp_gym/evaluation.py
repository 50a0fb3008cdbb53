"""`evaluate`: policies against the baselines every comparison needs, on the same requests.

Every condition (recording, model, system, batch size) also runs all experts far at 4 bit and the
two placements that need no far device, so that a speed-up always says against what.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ndp_gym
from ndp_gym.budget import HbmBudget
from ndp_gym.contenders import Contender, PolicyLike, all_far4, all_hbm_rows, contenders
from ndp_gym.importers.popularity import ProfileLike, profile_for
from ndp_gym.inputs import (
    Inputs,
    ModelLike,
    QualityLike,
    SystemLike,
    TraceLike,
    check_integer,
    combinations,
    distinct_integers,
    find_quality,
    trace_argument,
)
from ndp_gym.policy import InfeasibleError, MissingProfileError
from ndp_gym.provenance import (
    env_spec_json,
    git_commit,
    package_versions,
    quality_facts,
    spec_facts,
)
from ndp_gym.quality import QualityModel
from ndp_gym.quality_file import QualityFile
from ndp_gym.regret import add_regret, bounds_of
from ndp_gym.results import AtQuality, Condition, EvaluationResult, Row, at_quality
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.rollout import Measurement, Replayed, Task, Watch, run_policy
from ndp_gym.rows import Entry, compare, measured_row, missing_row, score_of
from ndp_gym.schedule import Scheduling
from ndp_gym.specs import SystemSpec
from ndp_gym.uncertainty import PLANS, Score, Study, applied, constants_of, study

__all__ = ["evaluate"]

Progress = Callable[[str, int, int], None]
"""Called after every window with what runs, tokens decoded so far, and tokens of the whole run."""


def evaluate(
    policies: PolicyLike | Iterable[PolicyLike],
    traces: TraceLike | Sequence[TraceLike] = None,
    models: ModelLike | Sequence[ModelLike] = None,
    systems: SystemLike | Sequence[SystemLike] = None,
    *,
    batch_sizes: Sequence[int] = (8,),
    window: int = 16,
    hbm_budget: HbmBudget = 0.10,
    split: str = "test",
    scheduling: Scheduling = "continuous",
    quality_weight: str | float = "balanced",
    quality: QualityLike = None,
    max_windows: int | None = None,
    seeds: Sequence[int] = (0,),
    actual_systems: Mapping[str, SystemSpec] | None = None,
    uncertainty: int = 0,
    bound: bool = False,
    profile: ProfileLike | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Rows of every policy, and of the baselines, under every condition.

    All requests of the split run in file order. A policy that draws random numbers runs once per
    seed and its row pools the runs; others run once.

    Args:
        policies: names (see `ndp_gym.policy.resolve`), policy objects, classes or functions that
            make one.
        traces: paths or recordings; ``None`` is the bundled one.
        models: preset names or specs; ``None`` takes each recording's own preset. Of several, each
            recording runs with those it agrees with.
        systems: preset names or specs; ``None`` is the default system.
        batch_sizes: slots, a condition each.
        window: decode steps per plan.
        hbm_budget: bytes, a share of all routed-expert bytes at 16 bit, or ``"auto"``.
        split: ``test``, or ``train`` and ``val`` for tuning and selection.
        scheduling: ``continuous`` or ``static`` batching.
        quality_weight: a name of `ndp_gym.reward.QUALITY_WEIGHTS`, or 1/nat.
        quality: error model, or path of measured errors; the default one if ``None``, whose kappa
            was fitted with ``mse_g128``: rows of other formats are then marked.
        max_windows: stop each run early.
        seeds: for policies that draw random numbers, distinct.
        actual_systems: by nominal name, the system that really runs where it differs from what
            policies are told (a throttled GPU, a shared link); give it a name of its own.
        uncertainty: samples of the uncertain constants (see `ndp_gym.uncertainty`) under which
            every policy runs again with the first seed, told the sampled system; the runs at the
            ends of the ranges come on top.
        bound: give every row its regret to a proved upper bound of the reward (1 s per window).
        profile: popularity [L, E] that policies are told in place of the train split's; a path of
            an imatrix, of SGLang counts, of a ``.npy`` or of a recording (`load_profile`).
        command: recorded as provenance; ``None`` records ``sys.argv``.
        progress: called after every window.

    Raises:
        ValueError: unknown names, recordings and models that disagree, budgets that do not fit,
            numbers out of range, a policy that fails (`ndp_gym.policy_calls.PolicyError`).
    """
    batch_sizes = distinct_integers("batch_sizes", batch_sizes, least=1)
    seeds = distinct_integers("seeds", seeds, least=0)
    _check_counts(window, max_windows, uncertainty)
    taking_part = contenders(policies)
    rows, quality_rows, studies = list[Row](), list[AtQuality](), list[Study]()
    task_of = partial(
        Task, window=window, hbm_budget=hbm_budget, split=split, scheduling=scheduling,
        kappa_given=quality is not None, quality_weight=weight_of(quality_weight),
        max_windows=max_windows,
    )  # fmt: skip
    provenance, given = _provenance(command, seeds, quality), (quality, profile)
    found = combinations(traces, models, systems)
    for facts, task in _tasks(found, batch_sizes, task_of, actual_systems, provenance, *given):
        here = _condition(taking_part, task, seeds, facts, progress, bound=bound)
        rows += here
        quality_rows += at_quality(here)
        if uncertainty:
            studies.append(_study(taking_part, task, seeds, here, uncertainty, progress))
    return EvaluationResult(
        rows=rows, at_quality=quality_rows, provenance=provenance, uncertainty=studies
    )


def _check_counts(window: int, max_windows: int | None, uncertainty: int) -> None:
    """Raise ``ValueError`` where one is out of range."""
    check_integer("window", window, least=1)
    check_integer("uncertainty", uncertainty, least=0)
    if max_windows is not None:
        check_integer("max_windows", max_windows, least=1)


def _tasks(
    found: Iterable[Inputs],
    batch_sizes: Sequence[int],
    task_of: Callable[..., Task],
    actual_systems: Mapping[str, SystemSpec] | None,
    provenance: dict[str, Any],
    quality: QualityLike,
    given_profile: ProfileLike | None,
) -> Iterator[tuple[dict[str, Any], Task]]:
    """Fields that rows share, and task, of every condition; each is added to the provenance."""
    actual_systems = actual_systems or {}
    for name, actual in actual_systems.items():
        if actual.name == name:
            raise ValueError(f"the actual system of {name!r} must have a name of its own")
    for inputs in found:
        _describe(inputs, provenance)
        for actual in actual_systems.values():
            provenance["systems"][actual.name] = spec_facts(actual)
        profile, profile_facts = profile_for(given_profile, inputs.trace, inputs.model)
        provenance["profile"] = profile_facts
        error_model = find_quality(quality, inputs.model, inputs.system)
        for batch_size in batch_sizes:
            task = task_of(
                trace=inputs.trace,
                model=inputs.model,
                system=inputs.system,
                actual=actual_systems.get(inputs.system.name),
                quality=error_model,
                batch_size=batch_size,
                profile=profile,
                profile_source=None if profile_facts is None else profile_facts["source"],
            )
            yield _facts(inputs.label, task, quality), task


def _condition(
    named: Sequence[Contender],
    task: Task,
    seeds: Sequence[int],
    facts: dict[str, Any],
    progress: Progress | None,
    *,
    bound: bool,
) -> list[Row]:
    """All rows of one condition: baselines first, then the contenders in the order given."""
    windows: list[Replayed] = []
    watch = windows.append if bound else None
    entries = [_entry(all_far4(), task, seeds, facts, progress, watch)]
    measured = entries[0].measurement
    assert measured is not None
    others = [*all_hbm_rows(measured.min_budget_bytes, task.profile), *named]
    entries += [_entry(other, task, seeds, facts, progress) for other in others]
    compare(entries)
    if bound:
        report = None if progress is None else partial(progress, "bound")
        add_regret(entries, bounds_of(task, windows, report))
    return [entry.row for entry in entries]


def _entry(
    contender: Contender,
    task: Task,
    seeds: Sequence[int],
    facts: dict[str, Any],
    progress: Progress | None,
    watch: Watch | None = None,
) -> Entry:
    """The row of one contender and the measurement behind it."""
    name = contender.name
    try:
        pooled, used = _measure(contender, task, seeds, progress, watch)
    except (InfeasibleError, MissingProfileError) as error:
        validity = "infeasible" if isinstance(error, InfeasibleError) else "n/a"
        return Entry(row=missing_row(name, validity, str(error), facts), measurement=None)
    return Entry(row=measured_row(name, pooled, task, facts, used), measurement=pooled)


def _measure(
    contender: Contender,
    task: Task,
    seeds: Sequence[int],
    progress: Progress | None,
    watch: Watch | None,
) -> tuple[Measurement, list[int]]:
    """Run one contender once, or once per seed if it draws random numbers -> pooled, seeds used."""
    label = f"{contender.name}, batch {task.batch_size}"
    report = None if progress is None else partial(progress, label)
    run = partial(run_policy, task=task, name=contender.name, progress=report)
    pooled = run(contender.make(), seed=seeds[0], watch=watch)
    used = list(seeds) if pooled.used_rng else [seeds[0]]
    for seed in used[1:]:
        pooled.add(run(contender.make(), seed=seed))
    return pooled, used


def _study(
    named: Sequence[Contender],
    task: Task,
    seeds: Sequence[int],
    rows: list[Row],
    n_samples: int,
    progress: Progress | None,
) -> Study:
    """Run everything again under sampled constants, and mark the rows whose order flips."""
    constants, seed = constants_of(task.system), seeds[0]
    scores = partial(_scores, named, task, seed)
    report = None if progress is None else partial(progress, "uncertainty")
    pairs = study(constants, scores, n_samples=n_samples, seed=seed, progress=report)
    for row in rows:
        name = row["policy"]
        flipping = [p for p in pairs if p["flips"] and name in (p["a"], p["b"])]
        row["order_flips_with"] = [p["b"] if p["a"] == name else p["a"] for p in flipping]
    trace, model, system, batch_size, window = Condition.of(rows[0])
    return Study(
        trace=trace,
        model=model,
        system=system,
        batch_size=batch_size,
        window=window,
        n_samples=n_samples,
        seed=seed,
        plans=PLANS,
        constants=[asdict(constant) for constant in constants],
        pairs=pairs,
    )


def _scores(
    named: Sequence[Contender], task: Task, seed: int, values: Mapping[str, float]
) -> dict[str, Score]:
    """Scores of the baselines and of ``named`` where constants have other values."""
    system, quality = applied(values, task.system, task.quality)
    actual = task.actual and applied(values, task.actual, task.quality)[0]
    sampled = replace(task, system=system, actual=actual, quality=quality)
    far4 = all_far4()
    measured = run_policy(far4.make(), sampled, seed=seed)
    scores = {far4.name: score_of(measured, sampled)}
    for contender in (*all_hbm_rows(measured.min_budget_bytes, task.profile), *named):
        with suppress(InfeasibleError, MissingProfileError):
            measured = run_policy(contender.make(), sampled, seed=seed, name=contender.name)
            scores[contender.name] = score_of(measured, sampled)
    return scores


def _facts(label: str, task: Task, quality: QualityLike) -> dict[str, Any]:
    """The fields that all rows of one condition share."""
    kwargs = {
        "trace": trace_argument(task.trace),
        "model": task.model.name,
        "system": task.system.name,
        "batch_size": task.batch_size,
        "window": task.window,
        "hbm_budget": task.hbm_budget,
        "split": task.split,
        "scheduling": task.scheduling,
        "max_windows": task.max_windows,
        "quality_weight": task.quality_weight,
    }
    if isinstance(quality, str | os.PathLike):
        kwargs["quality"] = os.fspath(quality)
    shared = ("model", "system", "batch_size", "window", "split", "scheduling", "quality_weight")
    return {
        "trace": label,
        **{name: kwargs[name] for name in shared},
        "commit": git_commit(),
        "env_id": ndp_gym.ENV_ID,
        "env_spec": env_spec_json(kwargs),
        "trace_sha256": task.trace.sha256,
        "versions": "; ".join(f"{name} {v}" for name, v in package_versions().items()),
    }


def _provenance(command: str | None, seeds: Sequence[int], quality: QualityLike) -> dict[str, Any]:
    if isinstance(quality, str | os.PathLike):
        measured = QualityModel(table=QualityFile.open(quality).relative_error)
        error_facts = {**quality_facts(measured), "file": os.fspath(quality)}
    else:
        error_facts = quality_facts(quality or QualityModel())
    return {
        "command": " ".join(sys.argv) if command is None else command,
        "commit": git_commit(),
        "env_id": ndp_gym.ENV_ID,
        "versions": dict(package_versions()),
        "seeds": list(seeds),
        "quality": error_facts,
        "traces": {},
        "models": {},
        "systems": {},
    }


def _describe(inputs: Inputs, provenance: dict[str, Any]) -> None:
    """Add recording, model and system of one combination to the provenance."""
    facts = inputs.trace.metadata
    provenance["traces"][inputs.label] = {
        "sha256": inputs.trace.sha256,
        "model": facts.model,
        "source": facts.source,
        "licence": facts.licence,
        "recorder": facts.recorder,
        "phases": facts.phases,
        "id_order": facts.id_order,
    }
    provenance["models"][inputs.model.name] = spec_facts(inputs.model)
    provenance["systems"][inputs.system.name] = spec_facts(inputs.system)
