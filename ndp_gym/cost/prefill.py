"""Seconds of a prompt's prefill (``docs/model.md`` section 4)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.cost.decode import (
    activation_transfer_s,
    dense_stream_s,
    expert_bytes,
    far_expert_s,
    gpu_experts_s,
    transfer_s,
)
from ndp_gym.specs import MoESpec, SystemSpec


def prefill_s(
    model: MoESpec,
    system: SystemSpec,
    n_tokens: int,
    n_resident: npt.ArrayLike | None = None,
) -> float:
    """Seconds to process a prompt of ``n_tokens``, tokens spread evenly over the experts.

    Per layer: dense weights (the longer of compute and streaming), then the best split of the
    experts that are not in HBM: ``h`` are streamed to the GPU while the far device computes the
    rest. Experts run at the widest stored width. The GPU's own time for resident and streamed
    experts is added to the ``max`` (absent in the canonical form, never binding there).

    Args:
        model: the model.
        system: the system; where the far device cannot compute, everything is streamed.
        n_tokens: prompt length, 0 gives 0.
        n_resident: experts in HBM per routed layer, [L]; default none.

    Raises:
        ValueError: if ``n_tokens`` is negative or ``n_resident`` is outside 0..E.
    """
    resident = np.zeros(model.n_layers, np.int64) if n_resident is None else np.asarray(n_resident)
    resident = np.broadcast_to(resident.astype(np.int64), (model.n_layers,))
    if resident.min() < 0 or resident.max() > model.n_experts:
        raise ValueError(f"n_resident must be in 0..n_experts={model.n_experts}, got {resident}")
    return float(_fastest_split_s(prefill_parts(model, system, n_tokens))[resident].sum())


class PrefillParts(NamedTuple):
    """Seconds of one routed layer of a prompt, each by a number of experts 0..E; see `prefill_s`.

    The time of the dense (not routed) layers is spread evenly over the routed ones, so that the
    sum over the layers is that of the prompt.

    Attributes:
        outside_s: dense weights and attention.
        link_s, gpu_s, far_s: [E + 1] copying, serving on the GPU, and serving on the far device so
            many; infinite where the far device cannot.
    """

    outside_s: float
    link_s: npt.NDArray[np.float64]
    gpu_s: npt.NDArray[np.float64]
    far_s: npt.NDArray[np.float64]


def prefill_parts(model: MoESpec, system: SystemSpec, n_tokens: int) -> PrefillParts:
    """What the seconds of a prompt are made of.

    Raises:
        ValueError: if ``n_tokens`` is negative.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be >= 0, got {n_tokens}")
    counts = np.arange(model.n_experts + 1)
    if n_tokens == 0:
        return PrefillParts(0.0, *np.zeros((3, counts.size)))
    routed = model.attention_params + model.router_params + model.shared_params
    dense = model.attention_params + 3 * model.hidden_size * model.dense_size
    outside = model.n_dense_layers * _dense_part_s(model, system, n_tokens, dense)
    bits = system.stored_bits[0]
    tokens_each = n_tokens * model.top_k / model.n_experts
    each, sent = np.inf, 0.0
    if system.far.can_compute:
        each = float(far_expert_s(model, system, bits, tokens_each))
        sent = float(activation_transfer_s(model, system.link, n_tokens))
    far = np.zeros(counts.size)
    far[1:] = counts[1:] * each + sent
    return PrefillParts(
        outside_s=_dense_part_s(model, system, n_tokens, routed) + outside / model.n_layers,
        link_s=transfer_s(counts * expert_bytes(model, system.format, bits), system.link),
        gpu_s=gpu_experts_s(model, system, {bits: counts}, counts * tokens_each),
        far_s=far,
    )


def _fastest_split_s(parts: PrefillParts) -> npt.NDArray[np.float64]:
    """[E + 1] by experts in HBM, the fastest split of the others between link and far device."""
    counts = np.arange(parts.link_s.size)
    # rows: experts in HBM; columns: experts on the GPU once some were streamed
    streamed = counts[None, :] - counts[:, None]
    busy = np.maximum(parts.link_s[streamed], parts.gpu_s)
    split = np.maximum(busy, parts.far_s[::-1])
    fastest: npt.NDArray[np.float64] = np.where(streamed >= 0, split, np.inf).min(axis=1)
    return parts.outside_s + fastest


def _dense_part_s(model: MoESpec, system: SystemSpec, n_tokens: int, n_params: int) -> float:
    """``max(2 P N / (eta_c F_G), bytes / (eta_d BW_G))`` of ``n_params`` dense weights."""
    gpu = system.gpu
    compute = 2 * n_tokens * n_params / (gpu.compute_efficiency * gpu.flops_per_s)
    return max(compute, dense_stream_s(model, gpu, n_params))
