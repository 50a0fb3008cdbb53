"""Inter-token latency with all experts in HBM, and the time of one grouped expert kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from ndp_gym import cost, presets
from ndp_gym.specs import SystemSpec
from ndp_gym.units import MS, US
from ndp_gym.validation.recordings import Recordings

CONTEXT = 700
"""Tokens of context of each request (assumed; the leaderboard does not say)."""


class Served(NamedTuple):
    """A model served with all experts in HBM: its row id, presets, bits and batch sizes."""

    label: str
    gpu: str
    model: str
    system: str
    bits: int
    batches: tuple[int, ...]

    def target(self, batch: int) -> str:
        """Id of the row at that batch size."""
        return f"itl/{self.label}/{self.gpu}/b{batch}"

    def step_s(
        self, batch: int, distinct: float | None = None, system: SystemSpec | None = None
    ) -> float:
        """Seconds of a decode step; uniform routing unless ``distinct`` experts are given."""
        return cost.all_hbm_step_s(
            presets.model(self.model),
            system or presets.system(self.system),
            bits=self.bits,
            contexts=[CONTEXT] * batch,
            n_distinct=distinct,
        )

    def step_without_engine_s(self, batch: int) -> float:
        """Seconds of a decode step but for the engine's own time."""
        system = presets.system(self.system)
        bare = dataclasses.replace(system, engine_base_s=0.0, engine_token_s=0.0)
        return self.step_s(batch, system=bare)


CALIBRATED = (
    Served("qwen3-30b-bf16", "h100", "qwen3-30b-a3b", "h100_cxl_pnm", 16, (8, 16, 32, 64, 96)),
    Served("qwen3-30b-bf16", "b200", "qwen3-30b-a3b", "b200", 16, (8, 32, 128, 256)),
    Served("gpt-oss-20b-mxfp4", "h100", "gpt-oss-20b", "h100_mxfp4", 4, (8, 32, 64, 128)),
    Served("gpt-oss-20b-mxfp4", "b200", "gpt-oss-20b", "b200_mxfp4", 4, (8, 32, 64)),
)
TRACED = (
    Served("gpt-oss-120b-mxfp4", "h100", "gpt-oss-120b", "h100_mxfp4", 4, (8, 16, 32, 64)),
    Served("gpt-oss-120b-mxfp4", "b200", "gpt-oss-120b", "b200_mxfp4", 4, (8, 32, 64, 128)),
)
BATCH_1 = (
    Served("qwen3-30b-bf16", "h20", "qwen3-30b-a3b", "h20", 16, (1,)),
    Served("qwen3-30b-fp8", "h20", "qwen3-30b-a3b", "h20", 8, (1,)),
)

KERNEL_EXPERTS = (16, 32, 64, 128)


def milliseconds() -> dict[str, float]:
    """The rows whose routing is taken as uniform, in ms, by target id."""
    return {s.target(b): s.step_s(b) / MS for s in CALIBRATED for b in s.batches}


def bracket_ms(recordings: Recordings, served: Served, batch: int) -> tuple[float, float]:
    """Latency with the distinct experts of the recording, and with those of uniform routing, ms."""
    traced = served.step_s(batch, recordings.gpt_oss_distinct(batch))
    return traced / MS, served.step_s(batch) / MS


def batch_1_tokens_per_s() -> Mapping[str, float]:
    """Speed of one request on an H20, by target id."""
    return {s.target(1): 1 / s.step_s(1) for s in BATCH_1}


def kernel_target(n_experts: int) -> str:
    """Id of the kernel row with that many active experts."""
    return f"kernel/rtxpro6000/qwen3-30b/{n_experts}"


def kernel_us(n_experts: int) -> float:
    """Microseconds of the grouped kernel with one token in each of ``n_experts`` experts."""
    model, system = presets.model("qwen3-30b-a3b"), presets.system("rtxpro6000")
    return float(cost.gpu_experts_s(model, system, {16: n_experts}, n_experts)) / US
