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
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be >= 0, got {n_tokens}")
    if n_tokens == 0:
        return 0.0
    resident = np.zeros(model.n_layers, np.int64) if n_resident is None else np.asarray(n_resident)
    resident = np.broadcast_to(resident.astype(np.int64), (model.n_layers,))
    if resident.min() < 0 or resident.max() > model.n_experts:
        raise ValueError(f"n_resident must be in 0..n_experts={model.n_experts}, got {resident}")
    routed = model.attention_params + model.router_params + model.shared_params
    dense = model.attention_params + 3 * model.hidden_size * model.dense_size
    total = model.n_layers * _dense_part_s(model, system, n_tokens, routed)
    total += model.n_dense_layers * _dense_part_s(model, system, n_tokens, dense)
    counts, repeats = np.unique(resident, return_counts=True)
    for count, repeat in zip(counts, repeats, strict=True):
        total += int(repeat) * _experts_part_s(model, system, n_tokens, int(count))
    return float(total)


def _dense_part_s(model: MoESpec, system: SystemSpec, n_tokens: int, n_params: int) -> float:
    """``max(2 P N / (eta_c F_G), bytes / (eta_d BW_G))`` of ``n_params`` dense weights."""
    gpu = system.gpu
    compute = 2 * n_tokens * n_params / (gpu.compute_efficiency * gpu.flops_per_s)
    return max(compute, dense_stream_s(model, gpu, n_params))


def _experts_part_s(model: MoESpec, system: SystemSpec, n_tokens: int, n_resident: int) -> float:
    """The fastest split of one layer's absent experts between link and far device."""
    bits = system.stored_bits[0]
    tokens_each = n_tokens * model.top_k / model.n_experts
    absent = model.n_experts - n_resident
    streamed = np.arange(absent + 1)
    link = transfer_s(streamed * expert_bytes(model, system.format, bits), system.link)
    on_gpu = n_resident + streamed
    gpu = gpu_experts_s(model, system, {bits: on_gpu}, on_gpu * tokens_each)
    busy = np.maximum(link, gpu)
    if not system.far.can_compute:
        return float(busy[-1])
    far = (absent - streamed) * far_expert_s(model, system, bits, tokens_each)
    sent = activation_transfer_s(model, system.link, n_tokens)
    far = np.where(streamed < absent, far + sent, 0.0)
    return float(np.maximum(busy, far).min())
