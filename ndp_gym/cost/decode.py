"""Seconds and bytes of one decode step, term by term (``docs/model.md`` section 3)."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ndp_gym.specs import Format, GpuSpec, LinkSpec, MoEKernel, MoESpec, SystemSpec

FloatArray: TypeAlias = npt.NDArray[np.float64]


def expert_bytes(model: MoESpec, fmt: Format, bits: int) -> int:
    """Bytes of one expert stored at ``bits``: ``3 * H * I * bits_per_weight / 8``.

    Raises:
        ValueError: if the format does not define ``bits``.
    """
    if bits not in fmt.bits_per_weight:
        raise ValueError(
            f"bits must be in {sorted(fmt.bits_per_weight)} for format {fmt.name!r}, got {bits}"
        )
    return round(model.expert_params * fmt.bits_per_weight[bits] / 8)


def moe_kernel(system: SystemSpec, bits: int) -> MoEKernel:
    """The grouped MoE kernel of ``system``'s GPU that reads ``bits``-wide experts."""
    return system.gpu.moe_kernels[system.format.kernel[bits]]


def expert_flops(model: MoESpec) -> int:
    """FLOPs of one token in one gated expert: ``6 * H * I`` (a multiply-add counts two)."""
    return 2 * model.expert_params


def transfer_s(n_bytes: npt.ArrayLike, link: LinkSpec) -> FloatArray:
    """Seconds to copy ``n_bytes`` over ``link``: size / bandwidth, without latency.

    Copies are pipelined, so the latency is charged once per activation round trip only
    (:func:`activation_transfer_s`). ``T_mv`` of ``docs/model.md`` section 3.
    """
    return np.asarray(n_bytes, dtype=np.float64) / link.bandwidth_bytes_per_s


def dense_stream_s(model: MoESpec, gpu: GpuSpec, n_params: float) -> float:
    """Seconds to stream ``n_params`` dense weights from HBM: ``bytes / (eta_d * BW_G)``."""
    n_bytes = n_params * model.dense_bits / 8
    return n_bytes / (gpu.dense_efficiency * gpu.bandwidth_bytes_per_s)


def kv_token_s(model: MoESpec, gpu: GpuSpec) -> float:
    """Seconds per context token and layer of decode attention.

    Memory: ``kvB / (eta_kv * BW_G)``. MLA also computes its absorbed form, ``2 h (2 c + r)`` FLOPs
    per context token, and takes the longer of the two (``docs/model.md`` section 3).
    """
    memory = model.kv_bytes_per_token_layer / (gpu.kv_efficiency * gpu.bandwidth_bytes_per_s)
    compute = model.attention.decode_flops / (gpu.compute_efficiency * gpu.flops_per_s)
    return max(memory, compute)


def layer_constant_s(model: MoESpec, gpu: GpuSpec) -> float:
    """Seconds of one routed layer outside the overlap, without KV: launches and dense weights."""
    params = model.attention_params + model.router_params + model.shared_params
    return gpu.layer_launch_s + dense_stream_s(model, gpu, params)


def dense_layer_constant_s(model: MoESpec, gpu: GpuSpec) -> float:
    """Seconds of one dense (not routed) layer without KV: launches, attention and MLP weights."""
    params = model.attention_params + 3 * model.hidden_size * model.dense_size
    return gpu.layer_launch_s + dense_stream_s(model, gpu, params)


def layer_contexts(model: MoESpec, contexts: npt.ArrayLike) -> FloatArray:
    """Context tokens read per layer, summed over requests: ``sum_j min(S_j, window)``.

    Args:
        model: the model.
        contexts: tokens of context of each live request, [B].

    Returns:
        [n_all_layers], dense layers first.
    """
    lengths = np.atleast_1d(np.asarray(contexts, dtype=np.float64))
    full = float(lengths.sum())
    slid = float(np.minimum(lengths, model.sliding_window).sum())
    return np.where(np.asarray(model.sliding_layers), slid, full)


def attention_s(model: MoESpec, gpu: GpuSpec, contexts: npt.ArrayLike) -> FloatArray:
    """Seconds per routed layer of attention, router and shared experts (``T_att``), [L].

    Shared experts are part of the dense stream, outside the overlap of GPU and far experts.
    """
    read = layer_contexts(model, contexts)[model.n_dense_layers :]
    return layer_constant_s(model, gpu) + kv_token_s(model, gpu) * read


def dense_layers_s(model: MoESpec, gpu: GpuSpec, contexts: npt.ArrayLike) -> float:
    """Seconds of all dense (not routed) layers of one decode step; 0 where there are none."""
    read = layer_contexts(model, contexts)[: model.n_dense_layers]
    constant = model.n_dense_layers * dense_layer_constant_s(model, gpu)
    return constant + kv_token_s(model, gpu) * float(read.sum())


def gpu_experts_s(
    model: MoESpec,
    system: SystemSpec,
    n_distinct: Mapping[int, npt.ArrayLike],
    n_tokens: npt.ArrayLike,
) -> FloatArray:
    """Seconds of the HBM experts of a layer (``T_G``).

    One launch per distinct bitwidth in use, plus the longer of reading the weights and computing.

    Args:
        model: the model.
        system: supplies GPU and format.
        n_distinct: bitwidth -> number of distinct experts read at that width.
        n_tokens: (token, expert) pairs computed on the GPU.
    """
    gpu = system.gpu
    launch: FloatArray = np.zeros(())
    read: FloatArray = np.zeros(())
    for bits, count in n_distinct.items():
        kernel = moe_kernel(system, bits)
        n_experts = np.asarray(count, dtype=np.float64)
        launch = launch + np.where(n_experts > 0, kernel.launch_s, 0.0)
        rate = kernel.efficiency * gpu.bandwidth_bytes_per_s
        read = read + n_experts * (expert_bytes(model, system.format, bits) / rate)
    pairs = np.asarray(n_tokens, dtype=np.float64)
    compute = pairs * (expert_flops(model) / (gpu.compute_efficiency * gpu.flops_per_s))
    return np.asarray(launch + np.maximum(read, compute), dtype=np.float64)


def far_expert_s(
    model: MoESpec, system: SystemSpec, bits: int, n_tokens: npt.ArrayLike
) -> FloatArray:
    """Seconds of one expert with ``n_tokens`` tokens on the far device (``t_N``); 0 without tokens.

    The longer of reading the weights and ``6 H I max(m, m_min) c(b) / F_N``, where ``c`` is
    ``b / 16`` for a device that scales with bits and 1 for one that dequantises.

    Raises:
        ValueError: if the far device cannot compute.
    """
    far = system.far
    if not far.can_compute:
        raise ValueError(f"far device {far.name!r} must compute to serve in place, it cannot")
    tokens = np.asarray(n_tokens, dtype=np.float64)
    read = expert_bytes(model, system.format, bits) / (far.efficiency * far.bandwidth_bytes_per_s)
    compute = np.maximum(tokens, far.min_tokens) * far_token_s(model, system, bits)
    return np.where(tokens > 0, np.maximum(read, compute), 0.0)


def far_token_s(model: MoESpec, system: SystemSpec, bits: int) -> float:
    """Seconds of compute per token of an expert on the far device; infinite if it cannot."""
    far = system.far
    if not far.can_compute:
        return float("inf")
    scale = bits / 16 if far.compute_scaling == "bits" else 1.0
    return expert_flops(model) * scale / far.flops_per_s


def activation_transfer_s(model: MoESpec, link: LinkSpec, n_tokens: npt.ArrayLike) -> FloatArray:
    """Seconds to send ``n_tokens`` activations to the far device and back (``T_x``); 0 for none.

    Both directions share the link: ``2 t_lat + 2 u H 2 / BW_L``. A token is sent once however
    many far experts it has; the device sums their outputs.
    """
    tokens = np.asarray(n_tokens, dtype=np.float64)
    payload = transfer_s(tokens * activation_bytes(model), link)
    return np.where(tokens > 0, 2 * link.latency_s + payload, 0.0)


def activation_bytes(model: MoESpec) -> int:
    """Bytes per token over the link, there and back, at 16 bit."""
    return 2 * 2 * model.hidden_size


def far_branch_s(system: SystemSpec, transfer: npt.ArrayLike, experts: npt.ArrayLike) -> FloatArray:
    """Seconds of the far branch of a layer (``T_N``): ``max(t_floor, T_x + sum t_N)``, 0 unused."""
    total = np.asarray(transfer, dtype=np.float64) + np.asarray(experts, dtype=np.float64)
    return np.where(total > 0, np.maximum(system.far.floor_s, total), 0.0)


def combine_s(system: SystemSpec, gpu_s: npt.ArrayLike, far_s: npt.ArrayLike) -> FloatArray:
    """Seconds of GPU branch (``T_G + T_mv``) and far branch together, ``overlap`` of it hidden."""
    gpu = np.asarray(gpu_s, dtype=np.float64)
    far = np.asarray(far_s, dtype=np.float64)
    omega = system.overlap
    return omega * np.maximum(gpu, far) + (1 - omega) * (gpu + far)


def lm_head_s(model: MoESpec, gpu: GpuSpec) -> float:
    """Seconds to stream the output head: ``2 V H / (eta_d * BW_G)`` at 16 bit."""
    return dense_stream_s(model, gpu, model.vocab_size * model.hidden_size)


def engine_s(system: SystemSpec, n_tokens: float) -> float:
    """Seconds of the serving engine in a step of ``n_tokens`` tokens: ``a0 + a1 * B``."""
    return system.engine_base_s + system.engine_token_s * n_tokens


def requantise_s(model: MoESpec, system: SystemSpec, bits: int) -> float:
    """Seconds to make a ``bits``-wide copy of one expert on the far device.

    Reads the widest stored copy and writes the new one at the device's effective bandwidth
    (``docs/model.md`` section 4); 0 where replicas are stored or nothing changes.
    """
    widest = system.stored_bits[0]
    if not system.requantise or bits == widest:
        return 0.0
    moved = sum(expert_bytes(model, system.format, width) for width in (widest, bits))
    return moved / (system.far.efficiency * system.far.bandwidth_bytes_per_s)


def uniform_distinct(model: MoESpec, n_tokens: npt.ArrayLike) -> FloatArray:
    """Expected distinct experts of a layer under uniform routing: ``E (1 - (1 - k/E)^B)``.

    Real traces hit fewer; use their counts where there is a trace.
    """
    tokens = np.asarray(n_tokens, dtype=np.float64)
    missed = (1 - model.top_k / model.n_experts) ** tokens
    return np.asarray(model.n_experts * (1 - missed), dtype=np.float64)


def all_hbm_step_s(
    model: MoESpec,
    system: SystemSpec,
    *,
    bits: int,
    contexts: npt.ArrayLike,
    n_distinct: npt.ArrayLike | None = None,
) -> float:
    """Seconds of one decode step with every expert in HBM at one bitwidth (``T_step``).

    Args:
        model: the model.
        system: supplies GPU, format and engine term; link and far device are not used.
        bits: bitwidth of every expert.
        contexts: context tokens of each of the B requests, [B].
        n_distinct: distinct experts per routed layer, scalar or [L]; default uniform routing.
    """
    n_tokens = np.atleast_1d(np.asarray(contexts)).size
    distinct = uniform_distinct(model, n_tokens) if n_distinct is None else np.asarray(n_distinct)
    experts = gpu_experts_s(model, system, {bits: distinct}, n_tokens * model.top_k)
    layers = attention_s(model, system.gpu, contexts) + experts
    outside = dense_layers_s(model, system.gpu, contexts) + lm_head_s(model, system.gpu)
    return float(layers.sum()) + outside + engine_s(system, n_tokens)
