"""Perplexity and accuracy after quantization: the error model with its constants frozen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ndp_gym import presets
from ndp_gym.quality import QualityModel, accuracy_drop_points, delta_nll, perplexity
from ndp_gym.specs import Format, MoESpec
from ndp_gym.validation import seed
from ndp_gym.validation.recordings import Recordings
from ndp_gym.validation.targets import target

DEFAULT_FORMAT = "mse_g128"
KAPPA_RTN_OUTPUT = 3.44
"""Nats per squared relative error of DeepSeek-MoE-16B, fitted to its five points."""

DEEPSEEK_MOE_PPL = 6.50


class Masses(NamedTuple):
    """Shares of gate energy at 1, 2 and 3 bit, layers weighted as by default."""

    one: float
    two: float
    three: float

    def error(self, fmt: Format) -> float:
        """Relative error of the whole."""
        return sum(m * fmt.rel_mse[b] for b, m in zip((1, 2, 3), self, strict=True))


# From the bit maps and routing weights that the authors of PMQ and GEMQ published.
MIXED: Mapping[str, Masses] = {
    "pmq-2.54": Masses(0.096, 0.256, 0.648),
    "pmq-2.05": Masses(0.334, 0.274, 0.392),
    "pmq-1.57": Masses(0.600, 0.259, 0.141),
    "gemq-2.5": Masses(0.150, 0.129, 0.721),
    "gemq-1.5": Masses(0.593, 0.214, 0.193),
}

# Mean relative error of RTN by bitwidth, published beside the perplexities.
DEEPSEEK_ERROR = {8: 0.0090, 6: 0.0356, 5: 0.0713, 4: 0.1426, 3: 0.3801}

# Bits per weight of the whole file, published beside the perplexities.
GGUF_BITS = {
    "IQ2_S": 2.42,
    "IQ2_M": 2.66,
    "Q2_K": 2.96,
    "IQ3_XXS": 3.13,
    "IQ3_XS": 3.31,
    "IQ3_S": 3.49,
    "IQ3_M": 3.67,
    "Q3_K": 3.85,
    "IQ4_XS": 4.30,
    "Q4_0": 4.52,
    "IQ4_NL": 4.54,
    "Q4_K": 4.87,
    "Q5_0": 5.5,
    "Q5_K": 5.7,
    "Q6_K": 6.58,
}

# Published perplexity of mixed or uniform 2- to 3-bit Mixtral-8x7B, beside its accuracy.
MC_MOE_PPL = {
    "pmq-2.54": 5.09,
    "pmq-2.05": 5.91,
    "pmq-1.57": 8.50,
    "hessian-2.54": 5.41,
    "hessian-2.05": 6.65,
    "hessian-1.57": 14.20,
    "bsp-2.54": 13.61,
    "uniform-2": 16.38,
}

# Nominal bits per expert weight of checkpoints whose files were measured.
MC_MOE_BITS = (2.54, 2.05, 1.57)
EXPERT_LOSS_BITS = (1, 2)


def mixtral() -> MoESpec:
    """Mixtral-8x7B, on whose perplexities ``kappa`` was fitted."""
    return presets.model("mixtral-8x7b")


def loss_of_error(error: float, kappa: float | None = None, super_low_share: float = 0.0) -> float:
    """Nats lost by Mixtral-8x7B where every layer has this relative error."""
    model = mixtral()
    quality = QualityModel() if kappa is None else QualityModel(kappa)
    layers = np.full(model.n_layers, error)
    ones = np.ones(model.n_layers)
    return float(delta_nll(model, layers, ones, super_low_share, quality))


def mixed_ppl(name: str, kappa: float | None = None) -> float:
    """Perplexity of a published mixed-precision Mixtral-8x7B."""
    base = mixtral().ppl or math.nan
    loss = loss_of_error(MIXED[name].error(presets.fmt(DEFAULT_FORMAT)), kappa)
    return float(perplexity(base, loss))


def deepseek_target(bits: int) -> str:
    """Id of the DeepSeek-MoE-16B row at that bitwidth."""
    return f"quality/deepseek-moe-16b-rtn/{bits}bit"


def deepseek_ppl(bits: int, kappa: float = KAPPA_RTN_OUTPUT) -> float:
    """Perplexity of DeepSeek-MoE-16B from its published relative error, flat layer weights."""
    model = dataclasses.replace(mixtral(), layer_weights=(1.0,) * 32, super_experts=())
    error = np.full(model.n_layers, DEEPSEEK_ERROR[bits] ** 2)
    loss = delta_nll(model, error, np.ones(model.n_layers), 0.0, QualityModel(kappa))
    return float(perplexity(DEEPSEEK_MOE_PPL, loss))


def error_at_width(fmt: Format, bits_per_weight: float) -> float:
    """Relative error at a stored width, log-linear between the widths of ``fmt`` below 16 bit."""
    widths = sorted(b for b in fmt.bits_per_weight if b < 16)
    stored = [fmt.bits_per_weight[b] for b in widths]
    logs = [math.log(fmt.rel_mse[b]) for b in widths]
    return math.exp(float(np.interp(bits_per_weight, stored, logs)))


def gguf_loss(name: str) -> float:
    """Nats lost by a GGUF format, taken as a uniform quantizer of the same stored width."""
    return loss_of_error(error_at_width(presets.fmt(DEFAULT_FORMAT), GGUF_BITS[name]))


def stored_bits(nominal: float) -> float:
    """Stored bits per weight at a nominal mean width below 4: scales and zeros included."""
    fmt = presets.fmt(DEFAULT_FORMAT)
    low = math.floor(nominal)
    share = nominal - low
    return (1 - share) * fmt.bits_per_weight[low] + share * fmt.bits_per_weight[low + 1]


def accuracy_rows(recordings: Recordings) -> dict[str, float]:
    """Points lost by the seed's policy on Mixtral-8x7B, hits as share of energy, flat layers."""
    rel_mse = presets.fmt(DEFAULT_FORMAT).rel_mse
    share = seed.seed(recordings, "8x7b").far_share()
    return {
        f"seed/accuracy-drop/{bits}bit": float(
            accuracy_drop_points(loss_of_error(share * rel_mse[bits]))
        )
        for bits in (3, 2)
    }


def rows() -> dict[str, float]:
    """Every row of the group that needs no recording, by target id."""
    fmt, rtn = presets.fmt(DEFAULT_FORMAT), presets.fmt("rtn_g128")
    found = {f"quality/mixtral-ppl/{name}": mixed_ppl(name) for name in MIXED}
    for bits in DEEPSEEK_ERROR:
        found[deepseek_target(bits)] = deepseek_ppl(bits)
    for name in GGUF_BITS:
        found[f"quality/gguf-mixtral-dnll/{name}"] = gguf_loss(name)
    for corpus in ("wikitext2", "c4", "ptb"):
        found[f"quality/mixtral-experts-4bit-dnll/{corpus}"] = loss_of_error(fmt.rel_mse[4])
    collapsed = loss_of_error(fmt.rel_mse[2], super_low_share=1.0)
    found["quality/mixtral-ppl/uniform-2"] = float(perplexity(mixtral().ppl or math.nan, collapsed))
    for name, ppl in MC_MOE_PPL.items():
        lost = accuracy_drop_points(math.log(ppl / (mixtral().ppl or math.nan)))
        found[f"quality/mc-moe-accuracy-drop/{name}"] = float(lost)
    for nominal in MC_MOE_BITS:
        found[f"quality/stored-bits/mc-moe-{nominal}"] = stored_bits(nominal)
    for bits in EXPERT_LOSS_BITS:
        ratio = rtn.rel_mse[bits] / rtn.rel_mse[3]
        found[f"quality/expert-loss-ratio/{bits}-to-3bit"] = ratio
    return found


def published_loss(name: str) -> float:
    """``ln(ppl / ppl of 16 bit)`` of a published mixed-precision Mixtral-8x7B."""
    published = target(f"quality/mixtral-ppl/{name}").published
    return math.log(published / (mixtral().ppl or math.nan))
