"""What one decode window cost, with the stateless reference beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import (
    dense_read_bytes,
    far_energy_j,
    gpu_energy_j,
    link_energy_j,
    static_energy_j,
)
from ndp_gym.cost.decode import expert_flops
from ndp_gym.quality import QualityModel, layer_weights, nats_of
from ndp_gym.specs import MoESpec, SystemSpec

if TYPE_CHECKING:
    from ndp_gym.kernel_data import Planned, Replay

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One window's results, with a leading lane axis N; `lane` takes it away.

    Attributes:
        decode_s: seconds of the window's decode steps, requantisation included.
        load_s: seconds of the first plan's foreground load; part of time to first token, not of
            ``decode_s``.
        requantise_s: seconds of widths made on the far device; part of ``load_s`` for the first
            plan, else of ``decode_s``.
        step_s, step_tokens: [W] seconds and live tokens of each decode step (0 where all slots
            were idle).
        tokens: decoded tokens.
        routed, hits: routed (token, layer, expert) and those served from HBM.
        hbm_weight_bytes, far_weight_bytes: expert weights read on the GPU and on the far device.
        activation_bytes, fetch_bytes, migration_bytes: link traffic of activations (both
            directions), copies on demand, and promotions, partial ones included.
        wasted_bytes: promotion bytes of cancelled or overtaken copies.
        load_bytes: bytes of the first load.
        n_repaired: experts that the budget moved to the far tier.
        layer_s, gpu_s, far_s, link_s, stall_s: [L] seconds in the window: all of the layer;
            experts on the GPU; far device; link (activations and copies on demand); GPU waiting
            for far device or link.
        layer_hits, layer_routed: [L].
        layer_error, layer_energy: [L] squared-gate energy times relative error of the copy that
            served, and energy.
        counts, gate_energy: [L, E] tokens and squared-gate energy of each expert.
        served_tokens: [2, NB] routed tokens served by (GPU, far device) at each stored width.
        delta_nll: nats per token, see `ndp_gym.quality.delta_nll`.
        energy_j: joules, unvalidated.
        ref_decode_s, ref_delta_nll, ref_layer_s, ref_layer_error: the same counts with all
            experts far at 4 bit.
    """

    decode_s: FloatArray
    load_s: FloatArray
    requantise_s: FloatArray
    step_s: FloatArray
    step_tokens: IntArray
    tokens: IntArray
    routed: IntArray
    hits: IntArray
    hbm_weight_bytes: IntArray
    far_weight_bytes: IntArray
    activation_bytes: IntArray
    fetch_bytes: IntArray
    migration_bytes: IntArray
    wasted_bytes: IntArray
    load_bytes: IntArray
    n_repaired: IntArray
    layer_s: FloatArray
    gpu_s: FloatArray
    far_s: FloatArray
    link_s: FloatArray
    stall_s: FloatArray
    layer_hits: IntArray
    layer_routed: IntArray
    layer_error: FloatArray
    layer_energy: FloatArray
    counts: NDArray[np.int32]
    gate_energy: FloatArray
    served_tokens: IntArray
    delta_nll: FloatArray
    energy_j: FloatArray
    ref_decode_s: FloatArray
    ref_delta_nll: FloatArray
    ref_layer_s: FloatArray
    ref_layer_error: FloatArray

    def lane(self, lane: int) -> Outcome:
        """One lane's results as scalars and arrays without the lane axis."""
        return Outcome(**{f.name: getattr(self, f.name)[lane] for f in fields(self)})


@cache
def _compiled() -> tuple[ModuleType, ModuleType]:
    """The modules that bring numba: `ndp_gym.kernel` and `ndp_gym.outcome_loops`."""
    return import_module("ndp_gym.kernel"), import_module("ndp_gym.outcome_loops")


class Outputs(NamedTuple):
    """The kernel's raw results of one call; fields are named in `ndp_gym.kernel`."""

    planned: Planned
    replay: Replay
    reference: Replay


class Summary(NamedTuple):
    """What turns the kernel's results into nats and joules, for one model on one system."""

    layer_weights: FloatArray  # [L] sensitivities
    super_codes: IntArray  # codes of the super experts
    joules: FloatArray  # [13] see `energy_rates`


def summary_of(model: MoESpec, system: SystemSpec) -> Summary:
    """The constants of `outcome_of` for ``model`` on ``system``."""
    codes = [layer * model.n_experts + expert for layer, expert in model.super_experts]
    return Summary(
        layer_weights(model).copy(), np.array(codes, np.int64), energy_rates(model, system)
    )


def energy_rates(model: MoESpec, system: SystemSpec) -> FloatArray:
    """[13] joules, as `ndp_gym.cost.energy` charges them.

    Per unit of each column of `Replay.totals` (9), per token of one expert served on the GPU and on
    the far device, per decoded token, per second.
    """
    from ndp_gym import kernel as k

    gpu, far = system.gpu, system.far
    hbm_byte = float(gpu_energy_j(gpu, 1.0))
    kv_byte = hbm_byte * model.kv_bytes_per_token_layer
    rates = np.zeros(13)
    rates[[k.ACTIVATION, k.FETCH, k.MIGRATION]] = link_energy_j(system.link, 1.0)
    rates[k.HBM_BYTES] = hbm_byte
    rates[k.FAR_BYTES] = far_energy_j(far, 1.0)
    rates[k.STEPS] = hbm_byte * dense_read_bytes(model)
    rates[k.SLIDING] = kv_byte * sum(model.sliding_layers)
    rates[k.CONTEXT] = kv_byte * (model.n_all_layers - sum(model.sliding_layers))
    flops = expert_flops(model)
    outside_params = model.active_params - model.n_layers * model.top_k * model.expert_params
    rates[9] = gpu_energy_j(gpu, 0.0, flops)
    rates[10] = far_energy_j(far, 0.0, flops)
    rates[11] = gpu_energy_j(gpu, 0.0, 2 * outside_params)
    rates[12] = static_energy_j(system, 1.0)
    return rates


def outcome_of(
    outputs: Outputs, model: MoESpec, summaries: Sequence[Summary], quality: QualityModel
) -> Outcome:
    """Name the kernel's columns and add quality and energy; ``summaries`` has one per lane."""
    k, s = _compiled()
    planned, replay, reference = outputs
    n_lanes = replay.totals.shape[0]
    experts = (n_lanes, model.n_layers, model.n_experts)
    first = summaries[0]
    is_same = all(summary is first for summary in summaries)
    sums, counts = np.empty((n_lanes, 7)), np.empty((n_lanes, 3), np.int64)
    layer_counts = np.empty((n_lanes, model.n_layers, 2), np.int64)
    s.summarise(
        (planned.seconds, planned.counts),
        (
            replay.step_s, replay.layer, replay.low_tokens, replay.step_tokens, replay.served,
            replay.totals,
        ),
        (reference.step_s, reference.layer, reference.low_tokens),
        (first.layer_weights, first.super_codes),
        first.joules[None] if is_same else np.stack([summary.joules for summary in summaries]),
        sums,
        counts,
        layer_counts,
    )  # fmt: skip
    nats = nats_of(
        sums[:, s.RELATIVE : s.REF_RELATIVE + 1],
        sums[:, s.LOW_SHARE : s.REF_LOW_SHARE + 1],
        quality,
    )
    layer, totals = replay.layer, replay.totals
    return Outcome(
        decode_s=sums[:, s.DECODE_S],
        load_s=planned.seconds[:, 0],
        requantise_s=planned.seconds[:, 1],
        step_s=replay.step_s,
        step_tokens=replay.step_tokens,
        tokens=counts[:, s.TOKENS],
        routed=counts[:, s.ROUTED],
        hits=counts[:, s.HITS],
        hbm_weight_bytes=totals[:, k.HBM_BYTES],
        far_weight_bytes=totals[:, k.FAR_BYTES],
        activation_bytes=totals[:, k.ACTIVATION],
        fetch_bytes=totals[:, k.FETCH],
        migration_bytes=totals[:, k.MIGRATION],
        wasted_bytes=totals[:, k.OVERTAKEN] + planned.totals[:, k.CANCELLED],
        load_bytes=planned.totals[:, k.LOAD_BYTES],
        n_repaired=planned.totals[:, k.N_REPAIRED],
        layer_s=layer[:, :, k.LAYER_S],
        gpu_s=layer[:, :, k.GPU_S],
        far_s=layer[:, :, k.FAR_S],
        link_s=layer[:, :, k.LINK_S],
        stall_s=layer[:, :, k.STALL_S],
        layer_hits=layer_counts[:, :, 0],
        layer_routed=layer_counts[:, :, 1],
        layer_error=layer[:, :, k.ERROR],
        layer_energy=layer[:, :, k.ENERGY],
        counts=planned.counts.reshape(experts),
        gate_energy=planned.gate_energy.reshape(experts),
        served_tokens=replay.served,
        delta_nll=nats[:, 0],
        energy_j=sums[:, s.JOULES],
        ref_decode_s=sums[:, s.REF_DECODE_S],
        ref_delta_nll=nats[:, 1],
        ref_layer_s=reference.layer[:, :, k.LAYER_S],
        ref_layer_error=reference.layer[:, :, k.ERROR],
    )
