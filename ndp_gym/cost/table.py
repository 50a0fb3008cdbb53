"""The cost constants of one model on one system, as the compiled kernel reads them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.cost import decode
from ndp_gym.specs import MoESpec, SystemSpec


class CostTable(NamedTuple):
    """Constants of ``docs/model.md`` section 3, in seconds and bytes; NB is the number of widths.

    ``far_token_s`` is infinite where the far device cannot compute. ``layer_s`` is the constant
    part of each routed layer outside the overlap; ``kv_token_s`` is added per context token.
    """

    bits: npt.NDArray[np.int64]
    """[NB] stored bitwidths, descending."""
    index_of: npt.NDArray[np.int64]
    """[17] bitwidth -> index into the [NB] arrays, -1 where not stored."""
    weight_bytes: npt.NDArray[np.int64]
    """[NB] W(b), bytes of one expert."""
    gpu_weight_s: npt.NDArray[np.float64]
    """[NB] W(b) / (eta_w(b) BW_G)."""
    gpu_launch_s: npt.NDArray[np.float64]
    """[NB] t0_moe(b)."""
    far_weight_s: npt.NDArray[np.float64]
    """[NB] W(b) / (eta_n BW_N)."""
    far_token_s: npt.NDArray[np.float64]
    """[NB] 6 H I c(b) / F_N."""
    copy_s: npt.NDArray[np.float64]
    """[NB] W(b) / BW_L."""
    gpu_token_s: float
    """6 H I / (eta_c F_G)."""
    far_min_tokens: int
    far_floor_s: float
    link_latency_s: float
    link_bytes_per_s: float
    activation_bytes: int
    """Per token, both directions."""
    activation_token_s: float
    overlap: float
    layer_s: npt.NDArray[np.float64]
    """[L] launches, attention, router and shared-expert weights."""
    kv_token_s: float
    """Per context token and layer: the longer of KV read and absorbed MLA compute."""
    layer_slides: npt.NDArray[np.bool_]
    """[L] True where the layer sees ``min(S, sliding_window)``."""
    sliding_window: int
    dense_layer_s: float
    """Constant part of one dense (not routed) layer."""
    n_dense_full: int
    n_dense_sliding: int
    head_s: float
    engine_base_s: float
    engine_token_s: float


def cost_table(model: MoESpec, system: SystemSpec) -> CostTable:
    """Every constant the kernel needs to time ``model`` on ``system``.

    Raises:
        ValueError: if a stored width is unknown to the format.
    """
    gpu, link, far = system.gpu, system.link, system.far
    widths = system.stored_bits
    n_bytes = np.array([decode.expert_bytes(model, system.format, b) for b in widths], np.int64)
    kernels = [decode.moe_kernel(system, b) for b in widths]
    efficiency = np.array([kernel.efficiency for kernel in kernels])
    index_of = np.full(17, -1, dtype=np.int64)
    index_of[list(widths)] = np.arange(len(widths))
    slides = np.array(model.sliding_layers, dtype=np.bool_)
    n_dense_sliding = int(slides[: model.n_dense_layers].sum())
    sent = decode.activation_bytes(model)
    return CostTable(
        bits=np.array(widths, dtype=np.int64),
        index_of=index_of,
        weight_bytes=n_bytes,
        gpu_weight_s=n_bytes / (efficiency * gpu.bandwidth_bytes_per_s),
        gpu_launch_s=np.array([kernel.launch_s for kernel in kernels], dtype=np.float64),
        far_weight_s=n_bytes / (far.efficiency * far.bandwidth_bytes_per_s),
        far_token_s=np.array([decode.far_token_s(model, system, b) for b in widths]),
        copy_s=n_bytes / link.bandwidth_bytes_per_s,
        gpu_token_s=decode.expert_flops(model) / (gpu.compute_efficiency * gpu.flops_per_s),
        far_min_tokens=far.min_tokens,
        far_floor_s=float(far.floor_s),
        link_latency_s=float(link.latency_s),
        link_bytes_per_s=float(link.bandwidth_bytes_per_s),
        activation_bytes=sent,
        activation_token_s=sent / link.bandwidth_bytes_per_s,
        overlap=float(system.overlap),
        layer_s=np.full(model.n_layers, decode.layer_constant_s(model, gpu)),
        kv_token_s=decode.kv_token_s(model, gpu),
        layer_slides=slides[model.n_dense_layers :].copy(),
        sliding_window=model.sliding_window,
        dense_layer_s=decode.dense_layer_constant_s(model, gpu),
        n_dense_full=model.n_dense_layers - n_dense_sliding,
        n_dense_sliding=n_dense_sliding,
        head_s=decode.lm_head_s(model, gpu),
        engine_base_s=float(system.engine_base_s),
        engine_token_s=float(system.engine_token_s),
    )
