"""What one episode runs under: the machine that policies are told, and the one that runs.

The difference between the two reaches policies through measured seconds alone. `Conditions` in
`ndp_gym.conditions` draws these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

from ndp_gym.budget import HbmBudget
from ndp_gym.specs import SystemSpec

__all__ = ["KINDS", "Condition", "Kind", "Process", "Speeds", "nominal_system", "slowed"]

Kind = Literal["gpu_throttle", "far_throttle", "link_contention", "co_tenant"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RAMP_STEPS = 4
"""Levels of a ramp; few, so that few systems have to be priced."""


class Speeds(NamedTuple):
    """Actual over nominal speed: GPU and far device (bandwidth and compute), link bandwidth."""

    gpu: float = 1.0
    far: float = 1.0
    link: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Process:
    """Something that happens to the machine for a while, and passes.

    Attributes:
        kind: what it slows; of ``co_tenant``, the share of the HBM budget that it leaves.
        onset: first window it touches.
        length: windows it lasts, ramps included.
        ramp: windows on the way to ``factor``, and as many on the way back; 0 is a step.
        factor: speed or budget while it lasts, over what it was.
    """

    kind: Kind
    onset: int
    length: int
    ramp: int = 0
    factor: float

    def level(self, window: int) -> float:
        """The factor in ``window``, in `RAMP_STEPS` levels on the way."""
        since, left = window - self.onset, self.onset + self.length - window
        if since < 0 or left <= 0:
            return 1.0
        depth = min(1.0, min(since + 1, left) / (self.ramp + 1))
        return 1.0 - (1.0 - self.factor) * math.ceil(depth * RAMP_STEPS) / RAMP_STEPS


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What one episode runs under.

    Attributes:
        system: nominal, the one policies are told.
        batch_size: slots in use.
        hbm_budget: bytes, share or ``"auto"``, see `ndp_gym.lanes.Lanes`.
        quality_weight: 1 / nat.
        extra_context: tokens in every request's context before the recorded ones.
        speeds: actual over nominal speeds, from the start.
        processes: what happens on the way.
        domain_change: whether requests come domain by domain.
        actual: what runs at speeds of 1, ``None`` where that is ``system``.
    """

    system: SystemSpec
    batch_size: int
    hbm_budget: HbmBudget
    quality_weight: float
    extra_context: int = 0
    speeds: Speeds = field(default_factory=Speeds)
    processes: tuple[Process, ...] = ()
    domain_change: bool = False
    actual: SystemSpec | None = None

    def speeds_at(self, window: int) -> Speeds:
        """Actual over nominal speeds in ``window`` (0 is the first)."""
        gpu, far, link = self.speeds
        for process in self.processes:
            level = process.level(window)
            gpu *= level if process.kind == "gpu_throttle" else 1.0
            far *= level if process.kind == "far_throttle" else 1.0
            link *= level if process.kind == "link_contention" else 1.0
        return Speeds(gpu, far, link)

    def actual_at(self, window: int) -> SystemSpec:
        """The system that runs in ``window``."""
        system, speeds = self.actual or self.system, self.speeds_at(window)
        return system if speeds == Speeds() else slowed(system, speeds)

    def budget_factor_at(self, window: int) -> float:
        """Share of the HBM budget that co-tenants leave in ``window``; policies are told."""
        factor = 1.0
        for process in self.processes:
            factor *= process.level(window) if process.kind == "co_tenant" else 1.0
        return factor

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """Windows, ascending, whose speeds or budget differ from those of the window before."""
        touched = {w for p in self.processes for w in range(p.onset, p.onset + p.length + 1)}
        states = {
            w: (self.speeds_at(w), self.budget_factor_at(w))
            for w in touched | {w - 1 for w in touched}
        }
        return tuple(w for w in sorted(touched) if w > 0 and states[w] != states[w - 1])

    def told(self) -> dict[str, Any]:
        """What policies may know, as numbers; an HBM share stands beside it in the observation."""
        far, link = self.system.far, self.system.link
        return {
            "batch_size": self.batch_size,
            "quality_weight": self.quality_weight,
            "extra_context": self.extra_context,
            "far_bytes_per_s": far.bandwidth_bytes_per_s * far.efficiency,
            "far_flops_per_s": far.flops_per_s,
            "link_bytes_per_s": link.bandwidth_bytes_per_s,
        }

    def hidden(self) -> dict[str, Any]:
        """What policies are not told, as numbers; a process that does not happen has length 0."""
        found: dict[str, Any] = {f"{name}_speed": v for name, v in self.speeds._asdict().items()}
        found["domain_change"] = self.domain_change
        happening = {process.kind: process for process in self.processes}
        for kind in KINDS:
            process = happening.get(kind)
            found[f"{kind}_onset"] = process.onset if process else 0
            found[f"{kind}_length"] = process.length if process else 0
            found[f"{kind}_factor"] = process.factor if process else 1.0
        return found


def nominal_system(
    system: SystemSpec, link_bandwidth: float, far_bandwidth: float, far_compute: float
) -> SystemSpec:
    """``system`` with these factors on the speeds of link and far device."""
    if link_bandwidth == far_bandwidth == far_compute == 1:
        return system
    return _with_factors(system, 1.0, far_bandwidth, far_compute, link_bandwidth)


@lru_cache(maxsize=1024)
def slowed(system: SystemSpec, speeds: Speeds) -> SystemSpec:
    """``system`` at these speeds; launches and latencies stay."""
    return _with_factors(system, speeds.gpu, speeds.far, speeds.far, speeds.link)


def _with_factors(
    system: SystemSpec, gpu_speed: float, far_bandwidth: float, far_compute: float, link: float
) -> SystemSpec:
    gpu, far = system.gpu, system.far
    return replace(
        system,
        gpu=replace(
            gpu,
            bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s * gpu_speed,
            flops_per_s=gpu.flops_per_s * gpu_speed,
        ),
        far=replace(
            far,
            bandwidth_bytes_per_s=far.bandwidth_bytes_per_s * far_bandwidth,
            flops_per_s=far.flops_per_s * far_compute,
        ),
        link=replace(system.link, bandwidth_bytes_per_s=system.link.bandwidth_bytes_per_s * link),
    )
