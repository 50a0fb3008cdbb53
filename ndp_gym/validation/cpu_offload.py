"""One request with experts computed by the host CPU: measured speeds of four engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from ndp_gym import cost, presets
from ndp_gym.cost.decode import dense_layers_s
from ndp_gym.specs import MoESpec, SystemSpec

Q4_K_M_BITS = 4.85
"""Stored bits per weight of Q4_K_M checkpoints, from file sizes."""


class Offloaded(NamedTuple):
    """Mean experts per token and routed layer on the CPU and on the GPU.

    Attributes:
        model: Model preset; its dense weights have ``dense_bits``.
        system: System preset.
        bits: Width of all experts.
        far_hits: Experts of a token that the CPU computes.
        hbm_hits: Experts of a token in HBM.
        dense_bits: Width of everything but the experts.
        whole_layers: Share of layers that ``far_hits`` holds for; the others have all experts in
            HBM. 1 where every layer is split alike.
    """

    model: str
    system: str
    bits: int
    far_hits: float
    hbm_hits: float = 0.0
    dense_bits: float = 16.0
    whole_layers: float = 1.0

    def tokens_per_s(self, far_efficiency: float | None = None) -> float:
        """Speed at batch 1 and an empty context; ``far_efficiency`` replaces the preset's."""
        spec = dataclasses.replace(presets.model(self.model), dense_bits=self.dense_bits)
        system = presets.system(self.system)
        if far_efficiency is not None:
            far = dataclasses.replace(system.far, efficiency=far_efficiency)
            system = dataclasses.replace(system, far=far)
        split = step_s(spec, system, self.bits, self.far_hits, self.hbm_hits)
        resident = step_s(spec, system, self.bits, 0.0, spec.top_k)
        return 1 / (self.whole_layers * split + (1 - self.whole_layers) * resident)


def step_s(
    model: MoESpec, system: SystemSpec, bits: int, far_hits: float, hbm_hits: float
) -> float:
    """Seconds of a decode step with mean numbers of experts per token and layer."""
    far = far_hits * float(cost.far_expert_s(model, system, bits, 1))
    sent = cost.activation_transfer_s(model, system.link, 1 if far_hits else 0)
    on_gpu = cost.gpu_experts_s(model, system, {bits: hbm_hits}, hbm_hits)
    experts = float(cost.combine_s(system, on_gpu, cost.far_branch_s(system, sent, far)))
    gpu = system.gpu
    layers = float(cost.attention_s(model, gpu, [0]).sum()) + model.n_layers * experts
    return layers + dense_layers_s(model, gpu, [0]) + cost.lm_head_s(model, gpu)


def _deepseek(system: str, n_experts: int) -> Offloaded:
    return Offloaded("deepseek-v3", system, 4, n_experts, dense_bits=Q4_K_M_BITS)


_DUAL, _SINGLE = "cpu_xeon_6454s_dual_rtx4090", "cpu_xeon_6454s_rtx4090"
_RESIDENT = 8 * 28 / 128  # of the 8 experts of a token, where 28 of 128 are in HBM

CASES: Mapping[str, Offloaded] = {
    "cpu-offload/ktransformers-v0.2.1-dual-8": _deepseek(_DUAL, 8),
    "cpu-offload/ktransformers-v0.2-single-8": _deepseek(_SINGLE, 8),
    "cpu-offload/ktransformers-v0.2-dual-8": _deepseek(_DUAL, 8),
    "cpu-offload/ktransformers-v0.2.1-dual-6": _deepseek(_DUAL, 6),
    "cpu-offload/ktransformers-v0.2-single-6": _deepseek(_SINGLE, 6),
    "cpu-offload/ktransformers-0.5.2-qwen3-30b": Offloaded(
        "qwen3-30b-a3b", "cpu_epyc_9355_rtx5090", 16, 8 - _RESIDENT, _RESIDENT
    ),
    "cpu-offload/llamacpp-qwen3-30b": Offloaded(  # 36 of 48 layers on the CPU
        "qwen3-30b-a3b",
        "cpu_quad_ddr4_rtx2080",
        4,
        8,
        dense_bits=Q4_K_M_BITS,
        whole_layers=36 / 48,
    ),
    "cpu-offload/fiddler": Offloaded(  # about a quarter of the experts in HBM
        "mixtral-8x7b", "cpu_skylake_quadro_rtx6000", 16, 1.5, 0.5
    ),
}


def rows() -> dict[str, float]:
    """Every row of the group, in tokens/s by target id."""
    return {name: case.tokens_per_s() for name, case in CASES.items()}
