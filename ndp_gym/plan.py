"""Plans: tier and bitwidth of every expert, order of copies, and what serves a miss.

Plain data and the baseline plans every evaluation contains. Nothing here knows time or routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.cost import expert_bytes
from ndp_gym.specs import MoESpec, Service, SystemSpec

HBM, FAR = 0, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Tier (0 = HBM, 1 = far) and bitwidth of every expert.

    Attributes:
        tier: [L, E] uint8.
        bitwidth: [L, E] uint8; in HBM the width of the copy, on the far tier the width served (or
            fetched).

    Raises:
        ValueError: shapes differ, or a tier is neither 0 nor 1.
    """

    tier: NDArray[np.uint8]
    bitwidth: NDArray[np.uint8]

    def __post_init__(self) -> None:
        """Make both arrays contiguous uint8 and check them."""
        for name in ("tier", "bitwidth"):
            object.__setattr__(self, name, _unsigned(name, getattr(self, name)))
        if self.tier.ndim != 2 or self.tier.shape != self.bitwidth.shape:
            raise ValueError(
                "tier and bitwidth must both be [n_layers, n_experts], "
                f"got {self.tier.shape} and {self.bitwidth.shape}"
            )
        if self.tier.max(initial=0) > FAR:
            raise ValueError(f"tier must be 0 (HBM) or 1 (far), got {self.tier.max()}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A policy's answer for one window.

    Attributes:
        placement: tier and bitwidth per (layer, expert).
        migration_order: [L, E] finite priorities, higher is promoted earlier and repaired away
            later; ``None`` ranks by the load of the last window (of prefill, at first).
        service: what happens to an expert that is needed but not in HBM; ``None`` is the system's
            default.
    """

    placement: Placement
    migration_order: NDArray[np.float64] | None = None
    service: Service | None = None

    def __post_init__(self) -> None:
        """Check the order."""
        if self.migration_order is None:
            return
        order = np.ascontiguousarray(self.migration_order, dtype=np.float64)
        if order.shape != self.placement.tier.shape:
            raise ValueError(
                f"migration_order must have the placement's shape {self.placement.tier.shape}, "
                f"got {order.shape}"
            )
        if not np.isfinite(order).all():
            raise ValueError("migration_order must be finite")
        object.__setattr__(self, "migration_order", order)


def all_far(model: MoESpec, system: SystemSpec, bits: int = 4) -> Plan:
    """Every expert on the far tier at the stored width nearest to ``bits``."""
    shape = (model.n_layers, model.n_experts)
    width = nearest_width(system, bits)
    return Plan(placement=Placement(tier=np.full(shape, FAR), bitwidth=np.full(shape, width)))


def all_hbm(model: MoESpec, system: SystemSpec, budget_bytes: float) -> Plan | None:
    """Every expert in HBM at the largest uniform width that fits, else ``None``."""
    shape = (model.n_layers, model.n_experts)
    for bits in system.stored_bits:
        if (
            model.n_layers * model.n_experts * expert_bytes(model, system.format, bits)
            <= budget_bytes
        ):
            return Plan(
                placement=Placement(tier=np.full(shape, HBM), bitwidth=np.full(shape, bits))
            )
    return None


def all_hbm_mixed(
    model: MoESpec, system: SystemSpec, budget_bytes: float, load: ArrayLike | None = None
) -> Plan | None:
    """Every expert in HBM at mixed widths: the narrowest, then wider where it helps most per byte.

    The gain of a wider copy is the fall in relative error, weighted by ``load`` [L, E] (uniform
    if ``None``). ``None`` if even the narrowest width does not fit.
    """
    shape = (model.n_layers, model.n_experts)
    weight = np.ones(shape) if load is None else np.asarray(load, dtype=np.float64) + 1e-12
    widths = system.stored_bits[::-1]
    sizes = [expert_bytes(model, system.format, b) for b in widths]
    errors = [system.format.rel_mse[b] for b in widths]
    spare = int(budget_bytes) - weight.size * sizes[0]
    if spare < 0:
        return None
    level = np.zeros(weight.size, dtype=np.int64)
    upgrades = _upgrades(weight.ravel(), sizes, errors)
    for step, expert in upgrades:
        cost = sizes[step] - sizes[level[expert]]
        if level[expert] == step - 1 and cost <= spare:
            level[expert] = step
            spare -= cost
    bits = np.asarray(widths, dtype=np.uint8)[level].reshape(shape)
    return Plan(placement=Placement(tier=np.full(shape, HBM), bitwidth=bits))


def _upgrades(
    weight: NDArray[np.float64], sizes: list[int], errors: list[float]
) -> list[tuple[int, int]]:
    """(new level, expert) of every one-level upgrade, best fall in error per byte first."""
    gains = [(errors[i - 1] - errors[i]) / (sizes[i] - sizes[i - 1]) for i in range(1, len(sizes))]
    gain = np.outer(np.minimum.accumulate(gains), weight)
    ranking = np.argsort(-gain, axis=None, kind="stable")
    return [(int(i) // weight.size + 1, int(i) % weight.size) for i in ranking]


def nearest_width(system: SystemSpec, bits: int) -> int:
    """The stored width nearest to ``bits``, the larger one on a tie."""
    return min(system.stored_bits, key=lambda b: (abs(b - bits), -b))


def check_plan(plan: Plan, model: MoESpec, system: SystemSpec) -> None:
    """Raise ``ValueError`` where ``plan`` does not fit model, stored widths or far device."""
    shape = (model.n_layers, model.n_experts)
    if plan.placement.tier.shape != shape:
        raise ValueError(
            f"placement must be [n_layers, n_experts]={shape} of {model.name}, "
            f"got {plan.placement.tier.shape}"
        )
    widths = np.unique(plan.placement.bitwidth)
    missing = [int(b) for b in widths if int(b) not in system.stored_bits]
    if missing:
        raise ValueError(
            f"bitwidth must be one of stored_bits={system.stored_bits} of {system.name}, "
            f"got {missing}"
        )
    if plan.service is not None:
        check_service(plan.service, system)


def check_service(service: Service, system: SystemSpec) -> None:
    """Raise ``ValueError`` where ``service`` asks for what the system has not.

    That is a far device that computes (``in_place``, ``balance``) or a stored width.
    """
    if service.kind != "fetch" and not system.far.can_compute:
        raise ValueError(
            f"service {service.kind!r} needs a far device that computes, {system.far.name} cannot: "
            f"use 'fetch'"
        )
    missing = [bits for bits in service.rank_bits if bits not in system.stored_bits]
    if missing:
        raise ValueError(
            f"rank_bits must be among stored_bits={system.stored_bits} of {system.name}, "
            f"got {missing}"
        )


def _unsigned(name: str, values: ArrayLike) -> NDArray[np.uint8]:
    array = np.asarray(values)
    if array.dtype != np.uint8:
        if array.size and (array.min() < 0 or array.max() > 255):
            raise ValueError(f"{name} must be in 0..255, got {array.min()}..{array.max()}")
        array = array.astype(np.uint8)
    return np.ascontiguousarray(array)
