"""What a policy decided, as one placement that can be taken elsewhere: run, vote, write, read.

A policy may change its plan in every window, and engines that are told once cannot follow. So the
windows of a run are reduced to one placement: the last plan, or the majority. What each engine can
take of it is in `ndp_gym.plan_targets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.budget import HbmBudget
from ndp_gym.contenders import PolicyLike
from ndp_gym.cost import expert_bytes
from ndp_gym.explain import contender_of
from ndp_gym.importers.popularity import ProfileLike, profile_for
from ndp_gym.importers.source import integers, numbers
from ndp_gym.inputs import ModelLike, QualityLike, SystemLike, TraceLike, combinations, find_quality
from ndp_gym.plan import FAR, HBM, Placement
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.rollout import Replayed, Task, run_policy
from ndp_gym.schedule import Scheduling
from ndp_gym.trace_counts import decode_counts
from ndp_gym.trace_file import parse_json

__all__ = ["AT", "ExportedPlan", "decide", "decide_task", "read_plan"]

FORMAT = "ndp-gym plan 1"
AT = ("majority", "last")

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedPlan:
    """One placement, and what it was decided on.

    Attributes:
        placement: tier and bitwidth [L, E].
        share: [L, E] share of the run's windows in which the plan had the expert in HBM.
        load: [L, E] tokens per decode token on the run's requests.
        first_layer: the model's number of the first routed layer: dense layers come before it.
        facts: policy, recording, machine and budget, JSON values.
    """

    placement: Placement
    share: FloatArray
    load: FloatArray
    first_layer: int
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` turns them back."""
        columns = zip(
            self.placement.tier.tolist(),
            self.placement.bitwidth.tolist(),
            self.share.tolist(),
            self.load.tolist(),
            strict=True,
        )
        names = ("tier", "bits", "hbm_share_of_windows", "tokens_per_decode_token")
        layers = [
            {"layer": self.first_layer + index, **dict(zip(names, row, strict=True))}
            for index, row in enumerate(columns)
        ]
        return {"format": FORMAT, **self.facts, "tiers": ["hbm", "far"], "layers": layers}

    @classmethod
    def from_dict(cls, content: object, name: str) -> ExportedPlan:
        """The plan in the JSON values of `to_dict`; errors start with ``name``."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{name}: must be a plan of ndp-gym plan export --format json")
        layers = content.get("layers")
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise ValueError(f"{name}: layers must be a list of objects")

        def column(key: str, types: set[type]) -> NDArray[Any]:
            values = [layer.get(key) for layer in layers]
            return numbers(values, 2, f"{name}: {key}", types)

        found = integers([layer.get("layer") for layer in layers], 1, f"{name}: layer")
        if (found != np.arange(len(layers)) + found[0]).any():
            raise ValueError(f"{name}: layers must ascend by 1, got {found.tolist()!s:.80}")
        facts = {k: v for k, v in content.items() if k not in ("format", "tiers", "layers")}
        try:
            placement = Placement(tier=column("tier", {int}), bitwidth=column("bits", {int}))
        except ValueError as error:
            raise ValueError(f"{name}: {error}".replace(f"{name}: {name}", name)) from None
        return cls(
            placement=placement,
            share=column("hbm_share_of_windows", {int, float}).astype(np.float64),
            load=column("tokens_per_decode_token", {int, float}).astype(np.float64),
            first_layer=int(found[0]),
            facts=facts,
        )


def read_plan(path: Path) -> ExportedPlan:
    """The plan in a JSON file.

    Raises:
        ValueError: It is none; names the file.
        OSError: It cannot be read.
    """
    return ExportedPlan.from_dict(parse_json(path.read_bytes(), str(path)), str(path))


def decide(
    policy: PolicyLike,
    trace: TraceLike = None,
    model: ModelLike = None,
    system: SystemLike = None,
    *,
    at: str = "majority",
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
) -> ExportedPlan:
    """Run ``policy`` over the split and reduce its plans to one; see `decide_task` for ``at``.

    The other arguments are those of `ndp_gym.evaluate`.
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
    return decide_task(policy, task, at=at, seed=seed, progress=progress)


def decide_task(
    policy: PolicyLike,
    task: Task,
    *,
    at: str = "majority",
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportedPlan:
    """Run ``policy`` and reduce its plans, after repair, to one.

    ``last`` is the plan of the last window. ``majority`` holds what was in HBM in more than half of
    the windows, at the width most often used there; where that is more than the smallest budget of
    the run, the experts with the smallest share are left out.

    Raises:
        ValueError: ``at`` is neither, or the policy is infeasible here.
    """
    if at not in AT:
        raise ValueError(f"at must be one of {', '.join(AT)}, got {at!r}")
    windows: list[Replayed] = []
    contender = contender_of(policy, task)
    report = None if progress is None else partial(progress, contender.name)
    run_policy(
        contender.make(), task, seed=seed, name=contender.name, progress=report,
        watch=windows.append,
    )  # fmt: skip
    order = task.trace.split_requests(task.split)
    load = decode_counts(task.trace, order) / float(task.trace.requests.n_decode[order].sum())
    share = np.mean([window.wanted > 0 for window in windows], axis=0)
    budget = min(window.budget_bytes for window in windows)
    placement = (
        _last(windows[-1]) if at == "last" else _majority(windows, task, share, load, budget)
    )
    return ExportedPlan(
        placement=placement,
        share=share,
        load=load,
        first_layer=task.model.n_dense_layers,
        facts=_facts(contender.name, at, task, windows, placement, budget),
    )


def _last(window: Replayed) -> Placement:
    near = window.wanted > 0
    far_bits = window.plan.placement.bitwidth
    return Placement(
        tier=np.where(near, HBM, FAR), bitwidth=np.where(near, window.wanted, far_bits)
    )


def _majority(
    windows: list[Replayed], task: Task, share: FloatArray, load: FloatArray, budget: int
) -> Placement:
    wanted = np.stack([window.wanted for window in windows])
    planned = np.stack([window.plan.placement.bitwidth for window in windows])
    near_bits = _most_often(task.system.stored_bits, wanted, wanted > 0)
    far_bits = _most_often(task.system.stored_bits, planned, wanted == 0)
    size_of = {b: expert_bytes(task.model, task.system.format, b) for b in task.system.stored_bits}
    sizes = np.array([size_of[int(b)] for b in near_bits.ravel()])
    ranking = np.lexsort((-load.ravel(), -share.ravel()))
    ranking = ranking[share.ravel()[ranking] > 0.5]
    near = np.zeros(share.size, dtype=np.bool_)
    near[ranking[np.cumsum(sizes[ranking]) <= budget]] = True
    chosen = near.reshape(share.shape)
    return Placement(
        tier=np.where(chosen, HBM, FAR), bitwidth=np.where(chosen, near_bits, far_bits)
    )


def _most_often(
    widths: tuple[int, ...], bits: NDArray[np.uint8], where: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """[L, E] width that stands most often in the windows [N, L, E] where ``where`` holds."""
    votes = np.stack([((bits == width) & where).sum(axis=0) for width in widths])
    most: NDArray[np.uint8] = np.asarray(widths, dtype=np.uint8)[votes.argmax(axis=0)]
    return most


def _facts(
    name: str, at: str, task: Task, windows: list[Replayed], placement: Placement, budget: int
) -> dict[str, Any]:
    near = placement.bitwidth[placement.tier == HBM]
    service = windows[-1].plan.service or task.system.default_service
    return {
        "policy": name,
        "at": at,
        "n_windows": len(windows),
        "trace": task.trace.name if task.trace.path is None else task.trace.path.name,
        "trace_sha256": task.trace.sha256,
        "split": task.split,
        "model": task.model.name,
        "system": task.system.name,
        "batch_size": task.batch_size,
        "window": task.window,
        "hbm_budget_bytes": budget,
        "hbm_bytes": sum(expert_bytes(task.model, task.system.format, int(b)) for b in near),
        "service": json.loads(json.dumps(asdict(service))),
    }
