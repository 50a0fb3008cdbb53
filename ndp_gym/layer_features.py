"""The features of a layer agent: what it sees of its layer, dimensionless, and how it is scaled.

Logarithms of ratios, shares and differences of shares only, so that they mean the same for any
model, batch size and machine. Column by column in `features_of`; `FEATURES` has the scaling.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.lanes import Observations
from ndp_gym.layer_facts import LaneFacts
from ndp_gym.layer_forecast import Routing, entry
from ndp_gym.plan import HBM

FloatArray = NDArray[np.float64]

FEATURES: dict[str, tuple[float, float]] = {
    "load_top_16th": (0.2, 0.15),
    "load_top_8th": (0.35, 0.2),
    "load_top_4th": (0.55, 0.2),
    "load_top_half": (0.8, 0.15),
    "active_top_8th": (0.3, 0.2),
    "active_top_4th": (0.5, 0.2),
    "active_top_half": (0.75, 0.15),
    "active_share": (0.4, 0.25),
    "log_all_gpu": (-2.0, 1.0),
    "log_all_far": (0.0, 0.5),
    "log_outside": (-2.0, 1.0),
    "log_layer_over_mean": (0.0, 0.5),
    "resident_share": (0.3, 0.25),
    "resident_load": (0.5, 0.25),
    "resident_bits": (0.2, 0.15),
    "far_bits": (0.2, 0.15),
    "in_flight_share": (0.02, 0.05),
    "drift_last": (0.15, 0.1),
    "drift_prompts": (0.15, 0.1),
    "drift_prior": (0.25, 0.15),
    "hit_share": (0.5, 0.25),
    "log_measured_far": (0.0, 0.5),
    "log_gpu_over_far": (-1.0, 1.0),
    "log_gpu_over_far_all": (-1.0, 1.0),
    "log_batch": (2.0, 1.0),
    "log_budget": (0.0, 1.0),
    "admitted_share": (0.1, 0.3),
    "has_measured": (1.0, 1.0),
    "log_sensitivity": (0.0, 0.5),
    "log_quality_weight": (1.4, 1.0),
    "log_window": (2.8, 0.7),
    "log_moves": (0.0, 1.0),
    "log_slow_gpu": (0.3, 0.3),
    "log_slow_far": (0.3, 0.3),
    "log_slow_link": (0.3, 0.3),
}
"""Name -> (offset, scale): an agent sees ``(feature - offset) / scale``, clipped to [-5, 5]."""
_LEAST_S = 1e-9


class Estimate(NamedTuple):
    """Nominal seconds per decode step for the expected routing, and what was measured.

    Attributes:
        load, active: [N, L, E] tokens per step, probability that a step uses the expert.
        n_tokens: [N] tokens per step.
        outside_s: [N, L] attention and shared parts of the layer.
        far_s, gpu_s: [N, L] experts of the layer, all far or all on the GPU at 4 bit.
        experts_s: [N, L] measured seconds of the layer's experts, a guess at first.
        step_s, rest_s: [N] the whole step, and what is outside the routed layers.
    """

    load: FloatArray
    active: FloatArray
    n_tokens: FloatArray
    outside_s: FloatArray
    far_s: FloatArray
    gpu_s: FloatArray
    experts_s: FloatArray
    step_s: FloatArray
    rest_s: FloatArray


def outside_s(
    facts: LaneFacts, n_tokens: FloatArray, context: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Seconds of a step outside the routed experts: per routed layer [N, L], and the rest [N].

    Args:
        facts: nominal costs.
        n_tokens: [N] live requests.
        context: [N] context tokens of all of them together.
    """
    table = facts.shared.table
    slid = np.minimum(context, n_tokens * table.sliding_window)
    seen = np.where(table.layer_slides, slid[:, None], context[:, None])
    n_dense = table.n_dense_full + table.n_dense_sliding
    dense_kv = table.n_dense_full * context + table.n_dense_sliding * slid
    rest = n_dense * facts.dense_layer_s + facts.kv_token_s * dense_kv + facts.head_s
    rest = rest + facts.engine_base_s + facts.engine_token_s * n_tokens
    return facts.layer_s + facts.kv_token_s[:, None] * seen, rest


def features_of(
    observations: Observations,
    routing: Routing,
    estimate: Estimate,
    facts: LaneFacts,
    weights: FloatArray,
    factors: FloatArray,
) -> dict[str, FloatArray]:
    """Every feature of `FEATURES`, unscaled, [N, L] each, or what broadcasts to it.

    ``factors`` [N, 3] are the speeds learnt (`ndp_gym.speeds`), ``weights`` [L] the sensitivities.
    """
    seconds = observations["layer"].astype(np.float64)
    gpu_s, far_s = seconds[..., 0], seconds[..., 1]
    reference_s = estimate.outside_s + estimate.far_s
    layer_s = estimate.outside_s + estimate.experts_s
    measured = far_s.any(axis=1, keepdims=True) | gpu_s.any(axis=1, keepdims=True)
    facts_of_lane = _lane_features(observations, np.asarray(measured)[:, 0], gpu_s, far_s, facts)
    facts_of_lane |= _machine(observations, estimate, facts, factors)
    return {
        **_coverage("load", estimate.load, {"16th": 16, "8th": 8, "4th": 4, "half": 2}),
        **_coverage("active", estimate.active, {"8th": 8, "4th": 4, "half": 2}),
        "active_share": estimate.active.mean(axis=-1),
        "log_all_gpu": np.log(estimate.gpu_s / reference_s),
        "log_all_far": np.log(estimate.far_s / reference_s.mean(axis=1, keepdims=True)),
        "log_outside": np.log(np.maximum(estimate.outside_s, _LEAST_S) / reference_s),
        "log_layer_over_mean": np.log(layer_s / layer_s.mean(axis=1, keepdims=True)),
        **_copies(observations, estimate),
        "drift_last": _distance(routing.last, routing.base),
        "drift_prompts": _distance(routing.prompts, routing.base),
        "drift_prior": _distance(routing.prior, routing.base),
        "hit_share": seconds[..., 4],
        "log_measured_far": measured * _ratio(far_s, estimate.far_s),
        "log_gpu_over_far": measured * _ratio(gpu_s, far_s),
        "log_sensitivity": np.log(np.maximum(weights * len(weights), 1e-3)),
        **{name: column[:, None] for name, column in facts_of_lane.items()},
    }


def _lane_features(
    observations: Observations,
    measured: NDArray[np.bool_],
    gpu_s: FloatArray,
    far_s: FloatArray,
    facts: LaneFacts,
) -> dict[str, FloatArray]:
    """What all layers of a lane share, [N] each."""
    context, table = observations["context"], facts.shared.table
    n_live = np.maximum(entry(context, "n_live"), 1.0)
    n_experts = observations["tier"][0].size
    middle = table.weight_bytes[int(np.abs(table.bits - 4).argmin())]
    budget = entry(context, "hbm_budget_bytes") / (0.4 * n_experts * float(middle))
    return {
        "log_gpu_over_far_all": measured * _ratio(gpu_s.sum(axis=1), far_s.sum(axis=1)),
        "log_batch": np.log2(n_live),
        "log_budget": np.log(np.maximum(budget, 1e-3)),
        "admitted_share": np.minimum(entry(context, "n_admitted") / n_live, 1.0),
        "has_measured": measured.astype(np.float64),
        "log_quality_weight": np.log(np.maximum(entry(context, "quality_weight"), 1e-3)),
        "log_window": np.log(entry(context, "window")),
    }


def _machine(
    observations: Observations, estimate: Estimate, facts: LaneFacts, factors: FloatArray
) -> dict[str, FloatArray]:
    """What a window can move over the lane's link, and how slow its machine was found, [N]."""
    middle = int(np.abs(facts.shared.table.bits - 4).argmin())
    window_s = entry(observations["context"], "window") * estimate.step_s
    n_experts = observations["tier"][0].size
    gpu, far, link = np.log(factors).T
    return {
        "log_moves": np.log(window_s / facts.copy_s[:, middle] / (0.1 * n_experts)),
        "log_slow_gpu": gpu,
        "log_slow_far": far,
        "log_slow_link": link,
    }


def _copies(observations: Observations, estimate: Estimate) -> dict[str, FloatArray]:
    """Where the experts of the layer are now, and at how many bits."""
    is_near = (observations["tier"] == HBM) & (observations["bitwidth"] > 0)
    bits = observations["bitwidth"].astype(np.float64) / 16
    n_near, n_far = is_near.sum(axis=-1), (~is_near).sum(axis=-1)
    load = estimate.load
    return {
        "resident_share": is_near.mean(axis=-1),
        "resident_load": (load * is_near).sum(axis=-1) / load.sum(axis=-1),
        "resident_bits": (bits * is_near).sum(axis=-1) / np.maximum(n_near, 1),
        "far_bits": (bits * ~is_near).sum(axis=-1) / np.maximum(n_far, 1),
        "in_flight_share": observations["in_flight"].mean(axis=-1, dtype=np.float64),
    }


def _coverage(name: str, values: FloatArray, parts: dict[str, int]) -> dict[str, FloatArray]:
    """Share of the sum that the largest 1 / part of the experts have, [N, L] per part."""
    sums = np.cumsum(np.sort(values, axis=-1)[..., ::-1], axis=-1)
    n_experts = values.shape[-1]
    total = sums[..., -1]
    return {
        f"{name}_top_{part}": sums[..., max(n_experts // n, 1) - 1] / total
        for part, n in parts.items()
    }


def _distance(one: FloatArray, other: FloatArray) -> FloatArray:
    """Total variation distance of two routings, in [0, 1]."""
    distance: FloatArray = 0.5 * np.abs(one - other).sum(axis=-1)
    return distance


def _ratio(one: FloatArray, other: FloatArray) -> FloatArray:
    """log(one / other), finite."""
    ratio: FloatArray = np.log(np.maximum(one, _LEAST_S) / np.maximum(other, _LEAST_S))
    return ratio
