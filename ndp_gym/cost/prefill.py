"""Seconds of a prompt's prefill (``validation.md`` section 1)."""

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
    return float(prefill_table_s(model, system, n_tokens)[resident].sum())


def prefill_table_s(model: MoESpec, system: SystemSpec, n_tokens: int) -> npt.NDArray[np.float64]:
    """Seconds of a prompt per routed layer, by the number of its experts that are in HBM, [E + 1].

    The time of the dense (not routed) layers is spread evenly over the routed ones, so that the
    sum over the layers is `prefill_s`.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be >= 0, got {n_tokens}")
    if n_tokens == 0:
        return np.zeros(model.n_experts + 1)
    routed = model.attention_params + model.router_params + model.shared_params
    dense = model.attention_params + 3 * model.hidden_size * model.dense_size
    outside = model.n_dense_layers * _dense_part_s(model, system, n_tokens, dense)
    every_layer = _dense_part_s(model, system, n_tokens, routed) + outside / model.n_layers
    return every_layer + _experts_part_s(model, system, n_tokens)


def _dense_part_s(model: MoESpec, system: SystemSpec, n_tokens: int, n_params: int) -> float:
    """``max(2 P N / (eta_c F_G), bytes / (eta_d BW_G))`` of ``n_params`` dense weights."""
    gpu = system.gpu
    compute = 2 * n_tokens * n_params / (gpu.compute_efficiency * gpu.flops_per_s)
    return max(compute, dense_stream_s(model, gpu, n_params))


def _experts_part_s(model: MoESpec, system: SystemSpec, n_tokens: int) -> npt.NDArray[np.float64]:
    """The fastest split of one layer's absent experts between link and far device, [E + 1]."""
    bits = system.stored_bits[0]
    tokens_each = n_tokens * model.top_k / model.n_experts
    counts = np.arange(model.n_experts + 1)
    # rows: experts in HBM; columns: experts on the GPU once some were streamed
    resident, on_gpu = counts[:, None], counts[None, :]
    streamed = on_gpu - resident
    link = transfer_s(streamed * expert_bytes(model, system.format, bits), system.link)
    gpu = gpu_experts_s(model, system, {bits: counts}, counts * tokens_each)
    busy = np.maximum(link, gpu)
    if not system.far.can_compute:
        return np.array(busy[:, -1])
    each = float(far_expert_s(model, system, bits, tokens_each))
    sent = float(activation_transfer_s(model, system.link, n_tokens))
    left = model.n_experts - counts
    far = np.where(left > 0, left * each + sent, 0.0)
    split = np.maximum(busy, far)
    return np.array(np.where(streamed >= 0, split, np.inf).min(axis=1))
