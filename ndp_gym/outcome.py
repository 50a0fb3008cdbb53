"""What one decode window cost, with the stateless reference beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
from ndp_gym.quality import QualityModel, delta_nll
from ndp_gym.specs import MoESpec, SystemSpec

if TYPE_CHECKING:
    from ndp_gym.kernel import Planned, Replay

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


class Outputs(NamedTuple):
    """The kernel's raw results of one call; fields are named in `ndp_gym.kernel`."""

    planned: Planned
    replay: Replay
    reference: Replay
    layers: FloatArray  # [2, N, L, 9] the memory behind ``replay.layer`` and ``reference.layer``


class EnergyRates(NamedTuple):
    """Joules per unit of what the kernel counts, on one system."""

    totals: FloatArray  # [9] per column of `Replay.totals`
    served: FloatArray  # [2] per token served on the GPU and on the far device
    token: float
    second: float


def energy_rates(model: MoESpec, system: SystemSpec) -> EnergyRates:
    """What `ndp_gym.cost.energy` charges for one byte, token and second."""
    from ndp_gym import kernel as k

    gpu, far = system.gpu, system.far
    hbm_byte = float(gpu_energy_j(gpu, 1.0))
    kv_byte = hbm_byte * model.kv_bytes_per_token_layer
    totals = np.zeros(9)
    totals[[k.ACTIVATION, k.FETCH, k.MIGRATION]] = link_energy_j(system.link, 1.0)
    totals[k.HBM_BYTES] = hbm_byte
    totals[k.FAR_BYTES] = far_energy_j(far, 1.0)
    totals[k.STEPS] = hbm_byte * dense_read_bytes(model)
    totals[k.SLIDING] = kv_byte * sum(model.sliding_layers)
    totals[k.CONTEXT] = kv_byte * (model.n_all_layers - sum(model.sliding_layers))
    flops = expert_flops(model)
    outside_params = model.active_params - model.n_layers * model.top_k * model.expert_params
    return EnergyRates(
        totals=totals,
        served=np.array([gpu_energy_j(gpu, 0.0, flops), far_energy_j(far, 0.0, flops)]),
        token=float(gpu_energy_j(gpu, 0.0, 2 * outside_params)),
        second=float(static_energy_j(system, 1.0)),
    )


def outcome_of(
    outputs: Outputs, model: MoESpec, rates: Sequence[EnergyRates], quality: QualityModel
) -> Outcome:
    """Name the kernel's columns and add quality and energy; ``rates`` has one entry per lane."""
    from ndp_gym import kernel as k

    planned, replay, reference, layers = outputs
    experts = (replay.totals.shape[0], model.n_layers, model.n_experts)
    layer, totals = replay.layer, replay.totals
    load_s, requantise_s = planned.seconds.T
    decode_s = replay.step_s.sum(axis=1) + np.where(load_s > 0, 0.0, requantise_s)
    tokens = replay.step_tokens.sum(axis=1)
    layer_counts = layer[:, :, k.HITS : k.ROUTED + 1].astype(np.int64)
    counts = layer_counts.sum(axis=1)
    nll, ref_nll = _delta_nll(outputs, layers, model, quality)
    return Outcome(
        decode_s=decode_s,
        load_s=load_s,
        requantise_s=requantise_s,
        step_s=replay.step_s,
        step_tokens=replay.step_tokens,
        tokens=tokens,
        routed=counts[:, 1],
        hits=counts[:, 0],
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
        delta_nll=nll,
        energy_j=_energy_j(replay, rates, tokens, decode_s),
        ref_decode_s=reference.step_s.sum(axis=1),
        ref_delta_nll=ref_nll,
        ref_layer_s=reference.layer[:, :, k.LAYER_S],
        ref_layer_error=reference.layer[:, :, k.ERROR],
    )


def _delta_nll(
    outputs: Outputs, layers: FloatArray, model: MoESpec, quality: QualityModel
) -> FloatArray:
    """[2, N] nats of plan and reference.

    The guard counts the share of the super experts' tokens that were served at <= 2 bits.
    """
    from ndp_gym import kernel as k

    low_share: FloatArray | float = 0.0
    if model.super_experts:
        codes = [layer * model.n_experts + expert for layer, expert in model.super_experts]
        low = [r.low_tokens[:, codes] for r in (outputs.replay, outputs.reference)]
        if low[0].any() or low[1].any():
            tokens = np.maximum(outputs.planned.counts[:, codes], 1)
            low_share = np.stack([(tokens_low / tokens).mean(axis=1) for tokens_low in low])
    return delta_nll(model, layers[..., k.ERROR], layers[..., k.ENERGY], low_share, quality)


def _energy_j(
    replay: Replay, rates: Sequence[EnergyRates], tokens: IntArray, decode_s: FloatArray
) -> FloatArray:
    """[N] joules of each lane's window, from its bytes, FLOPs and seconds."""
    served = replay.served.sum(axis=2)
    if all(rate is rates[0] for rate in rates):
        return _joules(rates[0], replay.totals, served, tokens, decode_s)
    lanes = zip(rates, replay.totals, served, tokens, decode_s, strict=True)
    return np.array([_joules(*lane) for lane in lanes])


def _joules(
    rate: EnergyRates,
    totals: IntArray,
    served: IntArray,
    tokens: IntArray,
    decode_s: FloatArray,
) -> FloatArray:
    """The scalar products of `EnergyRates` with what was counted; any leading axes."""
    # sums, not matrix products: those round differently with the number of lanes
    dynamic: FloatArray = (totals * rate.totals).sum(axis=-1) + (served * rate.served).sum(axis=-1)
    return dynamic + tokens * rate.token + decode_s * rate.second
