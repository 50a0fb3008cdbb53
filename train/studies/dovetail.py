"""``python -m train.studies.dovetail``: a draft on the GPU, verified by the far device."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ndp_gym import presets
from ndp_gym.cost import (
    activation_transfer_s,
    attention_s,
    dense_stream_s,
    engine_s,
    far_branch_s,
    far_expert_s,
    lm_head_s,
)
from ndp_gym.cost.decode import dense_layers_s
from ndp_gym.cost.table import cost_table
from ndp_gym.specs import GpuSpec, MoESpec, SystemSpec
from train.studies.recordings import IntArray, Studied, digits, table, write_study

FloatArray = npt.NDArray[np.float64]

DRAFT_SHARE = 0.05  # of the parameters that the target uses per token (assumed)
ACCEPTANCE = (0.6, 0.8, 0.909)
CONTEXT = 512  # tokens per request (assumed)
LONGEST = 16  # most tokens drafted
PAYS = 1.02  # a speed-up below is called none
N_DRAWS = 8
BATCH_SIZES = (1, 4, 16)
SETTINGS = (
    ("h100_cxl_seed_ndp", 16),
    ("h100_cxl_seed_ndp", 4),
    ("h100_cxl_pnm", 16),
    ("h100_cxl_pnm", 4),
    ("cpu_xeon_6454s_rtx4090", 16),
    ("cpu_xeon_6454s_rtx4090", 4),
)
CURVE = (("h100_cxl_pnm", 16), ("h100_cxl_pnm", 4), ("cpu_xeon_6454s_rtx4090", 4))  # batch 1
CURVE_ACCEPTANCE = 0.8
CURVE_K = (1, 2, 3, 4, 6, 8, 12, 16)


def accepted_tokens(acceptance: float, k: int) -> float:
    """Tokens per round and request: the accepted beginning of k drafts, and one of the target.

    ``1 + a + ... + a^k``, each draft token accepted with chance ``acceptance`` if all before it
    were (Leviathan et al. 2023, equation 1): 1 at acceptance 0, k + 1 at acceptance 1.
    """
    return float(np.sum(acceptance ** np.arange(k + 1)))


def speedup(acceptance: float, draft_s: float, verify_s: Sequence[float], k: int) -> float:
    """Throughput of drafting k tokens over decoding in place without.

    Args:
        acceptance: chance that a draft token is accepted.
        draft_s: seconds of one draft step.
        verify_s: seconds of a step of the target over k + 1 rows per request, by k from 0.
        k: tokens drafted per round.
    """
    return accepted_tokens(acceptance, k) * verify_s[0] / (k * draft_s + verify_s[k])


def best_k(acceptance: float, draft_s: float, verify_s: Sequence[float]) -> int:
    """The k of most tokens per second; 0 is decoding without a draft."""
    return int(np.argmax([speedup(acceptance, draft_s, verify_s, k) for k in range(len(verify_s))]))


def draft_step_s(model: MoESpec, gpu: GpuSpec, batch: int, share: float = DRAFT_SHARE) -> float:
    """Seconds of one draft token for each of ``batch`` requests on the GPU.

    One layer's launches and attention, ``share`` of the target's active weights, the target's head.
    """
    weights = dense_stream_s(model, gpu, share * model.active_params)
    attention = float(attention_s(model, gpu, np.full(batch, CONTEXT))[0])
    return attention + weights + lm_head_s(model, gpu)


def draw_counts(recording: Studied, batch: int, k: int) -> list[IntArray]:
    """[L, E] tokens per expert of rounds over k + 1 consecutive rows of ``batch`` requests."""
    rng = np.random.default_rng(0)
    requests = [rows for rows in recording.decode_rows("test") if len(rows) > LONGEST]
    drawn = []
    for _ in range(N_DRAWS):
        chosen = rng.choice(len(requests), batch, replace=False)
        starts = [rng.integers(len(requests[i]) - LONGEST) for i in chosen]
        rows = [requests[i][at : at + k + 1] for i, at in zip(chosen, starts, strict=True)]
        drawn.append(recording.counts(recording.trace.expert_ids[np.concatenate(rows)]))
    return drawn


def step_s(
    model: MoESpec, system: SystemSpec, bits: int, counts: npt.ArrayLike, batch: int, rows: int
) -> float:
    """Seconds of one step of the target over ``rows`` rows of each of ``batch`` requests.

    Every routed expert is far: activations of all rows travel, each expert reads its weights once
    for all its rows. Attention, router and head read their weights and the KV cache once.

    Args:
        model: the target.
        system: supplies GPU, link and far device.
        bits: stored width.
        counts: [L, E] rows per expert.
        batch: requests.
        rows: per request, k + 1.
    """
    contexts = np.full(batch, CONTEXT)
    experts = far_expert_s(model, system, bits, counts).sum(axis=-1)
    sent = activation_transfer_s(model, system.link, batch * rows)
    layers = attention_s(model, system.gpu, contexts) + far_branch_s(system, sent, experts)
    outside = dense_layers_s(model, system.gpu, contexts) + lm_head_s(model, system.gpu)
    return float(layers.sum()) + outside + engine_s(system, batch * rows)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One setting: seconds of a draft step, and of verifying by k."""

    name: str
    system: SystemSpec
    bits: int
    batch: int
    draft_s: float
    verify_s: list[float]

    def best(self, acceptance: float) -> tuple[int, float]:
        """The best k and its speed-up."""
        k = best_k(acceptance, self.draft_s, self.verify_s)
        return k, speedup(acceptance, self.draft_s, self.verify_s, k)

    def cells(self, model: MoESpec) -> list[str]:
        """The row of the table."""
        bests = [self.best(acceptance) for acceptance in ACCEPTANCE]
        return [
            f"`{self.name}`, {self.bits}",
            digits(free_rows(model, self.system, self.bits), 2),
            str(self.batch),
            digits(self.batch / self.verify_s[0]),
            digits(self.draft_s / self.verify_s[0], 2),
            digits(self.verify_s[4] / self.verify_s[0]),
            *(f"{k}: x {gain:.2f}" if k else "none" for k, gain in bests),
        ]


def free_rows(model: MoESpec, system: SystemSpec, bits: int) -> float:
    """Rows per expert up to which the far device waits for weights, not for compute."""
    costs = cost_table(model, system)
    at = costs.index_of[bits]
    return float(costs.far_weight_s[at] / costs.far_token_s[at])


def section(recording: Studied) -> Iterator[str]:
    """The tables of one recording, and what they say."""
    model = recording.model
    counts = {
        (batch, k): draw_counts(recording, batch, k)
        for batch in BATCH_SIZES
        for k in range(LONGEST + 1)
    }
    found = [_found(model, name, bits, b, counts) for name, bits in SETTINGS for b in BATCH_SIZES]
    yield f"## {recording.title[:1].upper()}{recording.title[1:]} (`{model.name}`)"
    yield ""
    yield from (f"- {line}" for line in _summary(found))
    yield ""
    head = "system, bits | free rows | batch | tokens/s, no draft | draft step | verify 5 rows"
    head += "".join(f" | best k at {acceptance:g}" for acceptance in ACCEPTANCE)
    yield from table(head.split(" | "), (each.cells(model) for each in found))
    yield f"Speed-up over k at batch 1 and acceptance {CURVE_ACCEPTANCE:g}:"
    yield ""
    rows = [each for each in found if each.batch == 1 and (each.name, each.bits) in CURVE]
    yield from table(["system, bits", *(f"k = {k}" for k in CURVE_K)], map(_curve, rows))


def _found(
    model: MoESpec,
    name: str,
    bits: int,
    batch: int,
    counts: dict[tuple[int, int], list[IntArray]],
) -> Found:
    system = presets.system(name)
    verify = [
        float(np.mean([step_s(model, system, bits, c, batch, k + 1) for c in counts[batch, k]]))
        for k in range(LONGEST + 1)
    ]
    draft = draft_step_s(model, system.gpu, batch)
    return Found(name=name, system=system, bits=bits, batch=batch, draft_s=draft, verify_s=verify)


def _curve(found: Found) -> list[str]:
    gains = (speedup(CURVE_ACCEPTANCE, found.draft_s, found.verify_s, k) for k in CURVE_K)
    return [f"`{found.name}`, {found.bits}", *(f"{gain:.2f}" for gain in gains)]


def _summary(found: list[Found]) -> Iterator[str]:
    for acceptance in ACCEPTANCE:
        bests = [each.best(acceptance) for each in found]
        used = [best for best in bests if best[1] >= PAYS]
        text = f"Acceptance {acceptance:g}: drafting pays in {len(used)} of {len(bests)} settings"
        if used:
            k, gains = zip(*used, strict=True)
            text += f", with k = {min(k)} to {max(k)}, x {min(gains):.2f} to {max(gains):.2f}"
        yield f"{text}."


OPENING = f"""\
# Dovetail as a study

Written by `python -m train.studies.dovetail`. Label: **mechanism**; every number is modeled.

## What the paper does

Dovetail (arXiv 2412.18934) runs a small draft model on the GPU and the target, a *dense* model that
does not fit there, on the CPU, which verifies the drafted tokens at once: its weights are read once
for all of them, and only activations travel. There are no experts to place, and a recording
fixes one token per step, so it is no policy. The idea for this library is the near-data device as
the verifier of a Mixture-of-Experts target.

## The rule here

A round drafts k tokens and verifies k + 1 rows of each of B requests (functions of `ndp_gym.cost`,
in `step_s` and `speedup` of `train/studies/dovetail.py`):

- Verification, per layer: `attention_s` + `far_branch_s(activation_transfer_s(B (k + 1)),
  sum of far_expert_s(m))`, with m the rows that chose the expert: weights are read once for all m,
  compute grows with m. All routed experts are far. Per step: dense layers, `lm_head_s` and
  `engine_s(B (k + 1))`.
- Draft, per token: one layer's launches and attention, {DRAFT_SHARE:.0%} of the target's active
  weights (`dense_stream_s`) and the target's head (`draft_step_s`).
- Tokens per round and request: `1 + a + ... + a^k` at acceptance a (`accepted_tokens`).
- Speed-up: tokens per round times the step at k = 0, over `k * draft + verify(k)`. k = 0 is
  decoding in place without a draft. The best k is the fastest of 0 to {LONGEST}.

m comes from {N_DRAWS} draws of k + 1 consecutive recorded rows of B test requests (seed 0).

Assumed: the draft's size; acceptance rates, independent from token to token
({", ".join(f"{a:g}" for a in ACCEPTANCE[:-1])}, and {ACCEPTANCE[-1]:g}, MoE-SpeQ's published share
of *experts* named right, as in `policies/moe_speq.py`); rejected rows choose experts as the
recorded ones do; one chain, no tree of candidates; {CONTEXT} tokens of context; the GPU's dense
part is as fast for k + 1 rows as for one, and drafting is not overlapped with verification.

## Against the published numbers

LLaMA2-13B: 10.14 times CPU-only decoding; 16 candidates instead of 60 raise the speed-up from
1.67 to 2.06, since verification time is linear in them. The target is dense, the baseline has no
GPU and candidates form a tree: nothing is comparable, none is reproduced. What carries over:
compute on the far side grows with the rows, so that k has an optimum. What does not: a dense
model reads the same weights for every row, while k + 1 rows of a Mixture-of-Experts touch more
experts (*verify 5 rows*, relative to 1). So a single request gains little. A larger batch, whose
rows share experts anyway, gains more, up to *free rows*, the rows per expert at which the far
device's compute takes as long as reading the weights. Narrow weights on a device that dequantises
leave hardly any.

Columns: *draft step* and *verify 5 rows* in units of a step without a draft; *best k: x speed-up*.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    return write_study("dovetail", OPENING, section, argv)


if __name__ == "__main__":
    sys.exit(main())
