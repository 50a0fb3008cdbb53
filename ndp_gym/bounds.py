"""The observation space: finite bounds of everything a policy sees, from specs and recording."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ndp_gym.batch import costs
from ndp_gym.cost import CostTable
from ndp_gym.lanes import Lanes
from ndp_gym.memory import LAYER_NAMES
from ndp_gym.policy import CONTEXT_NAMES

_MARGIN = 1.01
"""Factor on bounds of sums of seconds, for what rounding adds."""


def observation_space(lanes: Lanes, max_windows: int, *, moves: bool) -> spaces.Dict:
    """The space of `Lanes.observe` without its lane axis, flat, for episodes of ``max_windows``.

    Bounds are reached by what the simulator could do in principle, not by what is likely, under
    every condition that the lanes have been made for. ``moves``: plans may copy busy experts for a
    step (service ``balance``).
    """
    n_layers = lanes.shape[0]
    copies = moves or lanes.system.default_service.kind != "in_place"
    layer = np.array([_layer_bounds(lanes, copies)[name] for name in LAYER_NAMES])
    context = np.array(
        [_context_bounds(lanes, max_windows, copies)[name] for name in CONTEXT_NAMES]
    )
    experts = {
        "prefill_load": lanes.batch_size,
        "last_load": lanes.batch_size,
        "ema_load": lanes.batch_size,
        "gate_share": 1,
        "tier": 1,
        "bitwidth": 16,
        "in_flight": 1,
    }
    boxes: dict[str, spaces.Space[Any]]
    n_experts = n_layers * lanes.shape[1]
    boxes = {name: _box(np.full(n_experts, float(high))) for name, high in experts.items()}
    boxes["layer"] = _box(np.tile(layer, n_layers))
    boxes["context"] = _box(context)
    return spaces.Dict(boxes)


def _box(high: NDArray[np.float64]) -> spaces.Box:
    """From 0 to ``high``, rounded up to float32; an entry that is always 0 still gets a range."""
    high = np.where(high > 0, high, 1.0)
    rounded = high.astype(np.float32)
    short = rounded.astype(np.float64) < high
    rounded[short] = np.nextafter(rounded[short], np.float32(np.inf))
    return spaces.Box(np.zeros_like(rounded), rounded, dtype=np.float32)


def _layer_bounds(lanes: Lanes, copies: bool) -> dict[str, float]:
    """Most seconds of one layer in one decode step, by cause; the share of hits is at most 1."""
    slowest = lanes.drawn_from.slowest(lanes.base)
    table = costs(lanes.model, slowest, lanes.simulator.quality).prices.table
    model, n_tokens = lanes.model, lanes.batch_size
    n_active = min(model.n_experts, n_tokens * model.top_k)
    gpu_s = _gpu_bound_s(table, n_active, n_tokens * model.top_k)
    link_s = 2 * table.link_latency_s + n_tokens * table.activation_token_s
    far_s = 0.0
    if lanes.system.far.can_compute:
        rows = max(n_tokens, table.far_min_tokens)
        each = np.maximum(table.far_weight_s, table.far_token_s * rows).max()
        far_s = max(table.far_floor_s, n_active * float(each))
    copies_s = n_active * float(table.copy_s.max()) if copies else 0.0
    stall_s = gpu_s + far_s + link_s + copies_s
    return {
        "gpu_s": _MARGIN * gpu_s,
        "far_s": _MARGIN * far_s,
        "link_s": _MARGIN * (link_s + copies_s),
        "stall_s": _MARGIN * stall_s,
        "hit_share": 1.0,
    }


def _gpu_bound_s(table: CostTable, n_active: int, n_pairs: int) -> float:
    """All active experts on the GPU at the slowest width, every width launched."""
    read_s = n_active * float(table.gpu_weight_s.max())
    return float(table.gpu_launch_s.sum()) + max(read_s, table.gpu_token_s * n_pairs)


def _context_bounds(lanes: Lanes, max_windows: int, copies: bool) -> dict[str, float]:
    """Largest values of the context vector; budgets are bounded by HBM itself."""
    model, widest = lanes.model, lanes.widest
    gpu, far, link = widest.system.gpu, widest.system.far, widest.system.link
    requests, table = lanes.trace.requests, lanes.simulator.costs[0].prices.table
    n_used = model.n_layers * min(model.n_experts, lanes.batch_size * model.top_k)
    return {
        "hbm_budget_bytes": gpu.memory_bytes,
        "hbm_budget_share": gpu.memory_bytes / model.routed_bytes16,
        "batch_size": lanes.batch_size,
        "window": lanes.window,
        "gpu_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "gpu_flops_per_s": gpu.flops_per_s,
        "far_bytes_per_s": far.bandwidth_bytes_per_s * far.efficiency,
        "far_flops_per_s": far.flops_per_s,
        "link_bytes_per_s": link.bandwidth_bytes_per_s,
        "link_latency_s": link.latency_s,
        "quality_weight": widest.quality_weight,
        "n_live": lanes.batch_size,
        "n_admitted": lanes.batch_size,
        "mean_context": float(
            (requests.context_offset + requests.length).max() + widest.extra_context
        ),
        "tokens_generated": max_windows * lanes.window * lanes.batch_size,
        "in_flight_bytes": gpu.memory_bytes,
        "fetch_bytes": copies * n_used * float(table.weight_bytes.max()),
    }
