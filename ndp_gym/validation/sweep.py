"""Placement policies on real hardware: the sweep of KTransformers over the share of experts on GPU.

Qwen3-Next-80B in FP8 on four RTX 4090 and a Xeon 6454S (kvcache-ai/ktransformers,
experts-sched-Tutorial.md). Each policy's step times are normalised by its own end points:
``x = (t - t100) / (t0 - t100)`` is the share of CPU time that is left. The model of it is
``x = E[1[n > 0] max(f, n / k)]`` over decode tokens and layers, with ``n`` of the ``k`` experts of
a token off the GPU: the ``max`` floor of ``cost.far_branch_s`` in units of ``k`` experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ndp_gym import cost, presets
from ndp_gym.specs import GQA, MoESpec, SystemSpec
from ndp_gym.units import US
from ndp_gym.validation.sweep_routing import Routing, generate

Floats: TypeAlias = npt.NDArray[np.float64]
Residency: TypeAlias = "npt.NDArray[np.bool_]"

FLOOR = 0.42
"""``f``: the per-layer floor over the time of all ``k`` experts, fitted to the sweep."""

GPU_EXPERTS_S = 30 * US
"""Time of a layer's experts on the GPUs, assumed; it goes when they run on the CPU."""

SHARES = np.arange(1, 10) / 10
SEEDS = (0, 1, 2)
N_REQUESTS, N_PROMPT, N_DECODE = 16, 512, 64

MODEL = MoESpec(
    name="qwen3-next-80b-a3b",
    n_layers=48,
    hidden_size=2048,
    expert_size=512,
    n_experts=512,
    top_k=10,
    vocab_size=151936,
    attention=GQA(n_heads=16, n_kv_heads=2, head_dim=256),
    source="Hugging Face configuration; used for the size of its experts only, since three of four "
    "layers have linear attention, which no preset describes",
)

POLICIES = ("random", "uniform", "front", "frequency", "dynamic")

# tokens/s at 0, 10 .. 100 % of the experts on the GPU, from the tutorial's table.
MEASURED: Mapping[str, tuple[float, ...]] = {
    "random": (53.0, 56.6, 58.8, 62.9, 66.8, 70.4, 71.3, 74.4, 79.7, 88.8, 112.6),
    "front": (54.2, 57.2, 58.8, 63.9, 67.5, 73.7, 78.0, 81.6, 89.2, 98.1, 111.8),
    "frequency": (52.7, 58.6, 61.9, 66.5, 72.8, 76.2, 82.3, 89.4, 100.7, 107.2, 114.3),
    "dynamic": (53.4, 70.2, 74.7, 75.6, 81.0, 81.2, 82.3, 88.7, 92.3, 95.0, 113.0),
}
# Of ``uniform`` only x at five shares is at hand.
UNIFORM_X = {0.1: 0.88, 0.3: 0.72, 0.5: 0.64, 0.7: 0.42, 0.9: 0.34}


def measured_x(policy: str) -> Floats:
    """Published residual times at :data:`SHARES`, [9]; NaN where none is at hand."""
    if policy == "uniform":
        return np.array([UNIFORM_X.get(round(float(s), 1), np.nan) for s in SHARES])
    seconds = 1 / np.array(MEASURED[policy])
    return np.asarray((seconds[1:-1] - seconds[-1]) / (seconds[0] - seconds[-1]))


@cache
def off_gpu_shares() -> dict[str, Floats]:
    """P(n of k experts are off the GPU) of each policy, [9, k + 1], over all seeds."""
    total = {policy: np.zeros((len(SHARES), MODEL.top_k + 1)) for policy in POLICIES}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        routing = generate(
            rng,
            n_layers=MODEL.n_layers,
            n_experts=MODEL.n_experts,
            top_k=MODEL.top_k,
            n_requests=N_REQUESTS,
            n_prompt=N_PROMPT,
            n_decode=N_DECODE,
        )
        for policy in POLICIES:
            for index, share in enumerate(SHARES):
                for request, resident in residencies(policy, routing, float(share), rng):
                    total[policy][index] += _histogram(routing.decode[request], resident)
    return {policy: counted / counted.sum(axis=1)[:, None] for policy, counted in total.items()}


def residencies(
    policy: str, routing: Routing, share: float, rng: np.random.Generator
) -> Iterator[tuple[int, Residency]]:
    """(request, experts on the GPU [L, E]) of every request under a policy.

    ``random``: any (layer, expert). ``uniform``: equally many per layer. ``front``: whole layers.
    ``frequency``: the most popular of all layers together. ``dynamic``: the top share of each layer
    in the request's own prefill.
    """
    n_layers, n_experts = routing.decode.shape[2], routing.n_experts
    loads = list(routing.prefill_load)
    n_each, n_chosen = round(share * n_experts), round(share * n_layers * n_experts)
    if policy == "dynamic":
        yield from ((request, _largest(load, n_each)) for request, load in enumerate(loads))
        return
    if policy == "uniform":
        fixed = _largest(rng.random((n_layers, n_experts)), n_each)
    else:
        n_all = n_layers * n_experts
        score = {
            "random": rng.random(n_all),
            "front": -np.arange(n_all, dtype=np.float64),
            "frequency": np.sum(loads, axis=0).ravel(),
        }[policy]
        fixed = _largest(score, n_chosen).reshape(n_layers, n_experts)
    for request in range(len(loads)):
        yield request, fixed


def _largest(score: Floats, n: int) -> Residency:
    """True at the ``n`` largest entries of each row."""
    chosen = np.zeros(score.shape, dtype=np.bool_)
    order = np.argsort(-score, axis=-1, kind="stable")[..., :n]
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def _histogram(ids: npt.NDArray[np.int16], resident: Residency) -> Floats:
    """How often n of k experts are off the GPU, [k + 1]."""
    layers = np.arange(resident.shape[0])[None, :, None]
    off = (~resident[layers, ids]).sum(axis=2)
    return np.bincount(off.ravel(), minlength=ids.shape[2] + 1).astype(np.float64)


def model_x(policy: str, floor: float = FLOOR) -> Floats:
    """Modelled residual times at :data:`SHARES`, [9]."""
    share = np.arange(MODEL.top_k + 1) / MODEL.top_k
    left = np.where(share > 0, np.maximum(floor, share), 0.0)
    return np.asarray(off_gpu_shares()[policy] @ left)


def rmse(policy: str, floor: float = FLOOR) -> float:
    """Root mean square of model minus measurement over the shares that are published."""
    difference = model_x(policy, floor) - measured_x(policy)
    return float(np.sqrt(np.nanmean(difference**2)))


def tokens_per_s(policy: str) -> Floats:
    """Modelled speeds at :data:`SHARES` between the policy's measured end points, [9]."""
    ends = MEASURED.get(policy, MEASURED["random"])
    slow, fast = 1 / ends[0], 1 / ends[-1]
    return np.asarray(1 / (fast + model_x(policy) * (slow - fast)))


def _system() -> SystemSpec:
    """The Xeon of the sweep with experts at 8 bit."""
    system = presets.system("cpu_xeon_6454s_rtx4090")
    return dataclasses.replace(system, format=presets.fmt("mse_g128"), stored_bits=(8,))


def all_far_tokens_per_s() -> float:
    """Speed with no expert on the GPU; only the speed with all of them there is measured."""
    system = _system()
    fastest = float(np.mean([1 / speeds[-1] for speeds in MEASURED.values()]))
    experts = MODEL.top_k * float(cost.far_expert_s(MODEL, system, 8, 1))
    branch = float(cost.far_branch_s(system, 0.0, experts))
    return 1 / (fastest + MODEL.n_layers * (branch - GPU_EXPERTS_S))


def rows() -> dict[str, float]:
    """Every row of the group, by target id."""
    prefix = "ktransformers/sweep"
    found = {f"{prefix}-rmse/{policy}": rmse(policy) for policy in POLICIES}
    found[f"{prefix}-random-without-floor"] = rmse("random", floor=0.0)
    speed = {policy: tokens_per_s(policy) for policy in POLICIES}
    low = slice(0, 3)
    ordered = (speed["dynamic"] > speed["frequency"]) & (speed["frequency"] > speed["random"])
    found[f"{prefix}-order"] = float(ordered[low].all())
    found[f"{prefix}-order-above-60pct"] = float((speed["frequency"] > speed["dynamic"])[-2:].all())
    found[f"{prefix}-0pct"] = all_far_tokens_per_s()
    return found
