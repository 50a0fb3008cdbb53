"""``python -m train.studies.klotski``: how many batches hide the copies of a layer's experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ndp_gym import presets
from ndp_gym.cost import (
    attention_s,
    engine_s,
    expert_bytes,
    gpu_experts_s,
    kv_bytes,
    lm_head_s,
    transfer_s,
)
from ndp_gym.cost.decode import dense_layers_s
from ndp_gym.specs import SystemSpec
from train.studies.pipeline import FloatArray, LayerWork, smallest_n
from train.studies.recordings import IntArray, Studied, digits, table, write_study

RESIDENT_SHARE = 0.25  # of the experts of each layer, in HBM (assumed)
CONTEXT = 512  # tokens per request (assumed)
HIDDEN = 0.01  # a bubble share below counts as hidden (assumed)
MAX_TOKENS = 2**15  # of a group; more is not tried
N_GROUPS = 2  # drawn per condition
SETTINGS = (
    ("h100_cxl_seed_ndp", 16),
    ("h100_cxl_seed_ndp", 4),
    ("rtx4090_cxl_pnm", 4),
    ("cpu_epyc_9355_rtx5090", 4),
)
BATCH_SIZES = (4, 16, 64)
CURVE = ("h100_cxl_seed_ndp", 4, 16)  # system, bits, batch size of the table over n
CURVE_BATCHES = tuple(2**i for i in range(10))


class Draw:
    """Groups of requests drawn from a recording, and the experts that are popular in it."""

    def __init__(self, recording: Studied, batch: int) -> None:
        """Draw the rows; a group of n batches is the beginning of a longer one."""
        self.recording, self.batch = recording, batch
        ids, model = recording.trace.expert_ids, recording.model
        popular = recording.counts(ids[np.concatenate(recording.decode_rows("train"))])
        self.n_resident = round(RESIDENT_SHARE * model.n_experts)
        hottest = np.argsort(-popular, axis=1, kind="stable")[:, : self.n_resident]
        self.resident = np.zeros(popular.shape, np.bool_)
        np.put_along_axis(self.resident, hottest, np.True_, axis=1)
        rows = np.concatenate(recording.decode_rows("test"))
        drawn = np.random.default_rng(0).integers(len(rows), size=(N_GROUPS, MAX_TOKENS))
        self.rows = rows[drawn]
        self.known: dict[int, list[tuple[IntArray, IntArray]]] = {}

    @property
    def largest(self) -> int:
        """Most batches that are tried."""
        return MAX_TOKENS // self.batch

    def groups(self, n: int) -> list[tuple[IntArray, IntArray]]:
        """Of every drawn group of ``n`` batches: tokens and first batch of each expert, [L, E]."""
        if n not in self.known:
            self.known[n] = [self._group(rows[: n * self.batch], n) for rows in self.rows]
        return self.known[n]

    def _group(self, rows: IntArray, n: int) -> tuple[IntArray, IntArray]:
        ids = self.recording.trace.expert_ids[rows]
        first = np.full(self.resident.shape, n)
        batch = np.arange(len(rows))[:, None, None] // self.batch + 1
        layer = np.arange(len(first))[:, None]
        np.minimum.at(first, (layer, ids), np.broadcast_to(batch, ids.shape))
        return self.recording.counts(ids), first


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Drawn groups on one system at one width."""

    draw: Draw
    system: SystemSpec
    bits: int

    @property
    def contexts(self) -> IntArray:
        """Context tokens of the requests of one batch."""
        return np.full(self.draw.batch, CONTEXT)

    def room(self) -> int:
        """Batches whose KV cache fits in HBM beside dense weights and resident experts."""
        model, system = self.draw.recording.model, self.system
        resident = expert_bytes(model, system.format, self.bits) * int(self.draw.resident.sum())
        free = system.gpu.memory_bytes - model.dense_bytes - system.reserve_bytes - resident
        return max(free // kv_bytes(model, self.contexts), 0)

    def work(self, n: int) -> list[LayerWork]:
        """The work of every group of ``n`` batches."""
        return [self._work(counts, first, n) for counts, first in self.draw.groups(n)]

    def _work(self, counts: IntArray, first: IntArray, n: int) -> LayerWork:
        model, system = self.draw.recording.model, self.system
        compute = gpu_experts_s(model, system, {self.bits: 1.0}, counts)
        copy = float(transfer_s(expert_bytes(model, system.format, self.bits), system.link))
        return LayerWork(
            n_batches=n,
            attention_s=attention_s(model, system.gpu, self.contexts),
            expert_s=np.where(counts > 0, compute, 0.0),
            copy_s=np.where((counts > 0) & ~self.draw.resident, copy, 0.0),
            known_after=first,
        )

    def bubble(self, n: int, hot_first: bool = True) -> float:
        """Bubble share of ``n`` batches, mean over the groups."""
        return float(np.mean([work.bubble_share(hot_first) for work in self.work(n)]))

    def tokens_per_s(self, n: int, hot_first: bool = True) -> float:
        """Tokens per second of groups of ``n`` batches, head and engine of each batch included."""
        return self._rate(n, [work.end_s(hot_first) for work in self.work(n)])

    def sequential_tokens_per_s(self) -> float:
        """Tokens per second of one batch at a time with nothing overlapped."""
        return self._rate(1, [work.sequential_s() for work in self.work(1)])

    def _rate(self, n: int, layers_s: list[FloatArray]) -> float:
        model, system, batch = self.draw.recording.model, self.system, self.draw.batch
        outside = lm_head_s(model, system.gpu) + engine_s(system, batch)
        outside += dense_layers_s(model, system.gpu, self.contexts)
        return n * batch / (float(np.sum(layers_s)) / len(layers_s) + n * outside)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The smallest n of one setting and what it brings."""

    name: str
    setting: Setting
    n: int | None
    n_plain: int | None

    def cells(self) -> list[str]:
        """The row of the table."""
        at, largest, room = self.at, self.setting.draw.largest, self.setting.room()
        within = digits(self.gain(min(at, room))) if room else "-"
        return [
            f"`{self.name}`, {self.setting.bits}",
            str(self.setting.draw.batch),
            *(str(n) if n else f"> {largest}" for n in (self.n, self.n_plain)),
            _percent(self.setting.bubble(1)),
            _percent(self.setting.bubble(at, False)),
            digits(self.setting.tokens_per_s(at)),
            digits(self.gain(at)),
            str(room),
            within,
        ]

    @property
    def at(self) -> int:
        """The n found, or the largest tried."""
        return self.n or self.setting.draw.largest

    def attention_share(self) -> float:
        """Share of attention in the GPU's compute at the n found."""
        works = self.setting.work(self.at)
        attention = sum(work.n_batches * float(work.attention_s.sum()) for work in works)
        return attention / sum(float(work.busy_s.sum()) for work in works)

    def gain(self, n: int) -> float:
        """Throughput of ``n`` batches over sequential loading."""
        return self.setting.tokens_per_s(n) / self.setting.sequential_tokens_per_s()


def section(recording: Studied) -> Iterator[str]:
    """The tables of one recording, and what they say."""
    draws = {batch: Draw(recording, batch) for batch in sorted({*BATCH_SIZES, CURVE[2]})}
    found = list(_found(draws))
    system, bits, batch = CURVE
    curve = Setting(draw=draws[batch], system=presets.system(system), bits=bits)
    yield f"## {recording.title[:1].upper()}{recording.title[1:]} (`{recording.model.name}`)"
    yield ""
    yield from _summary(found)
    yield ""
    head = "system, bits | batch | n | n in number order | bubble at n = 1 | bubble in number order"
    head += " | tokens/s | x sequential | KV fits n | x sequential there"
    yield from table(head.split(" | "), (each.cells() for each in found))
    yield f"Over n, on `{system}` at {bits} bit in batches of {batch}:"
    yield ""
    head = "n | bubble, hot first | bubble, number order | x sequential | hot first gains x"
    yield from table(head.split(" | "), _curve(curve))


def _found(draws: dict[int, Draw]) -> Iterator[Found]:
    for name, bits in SETTINGS:
        for batch in BATCH_SIZES:
            setting = Setting(draw=draws[batch], system=presets.system(name), bits=bits)
            hot, plain = (
                smallest_n(partial(setting.bubble, hot_first=order), setting.draw.largest, HIDDEN)
                for order in (True, False)
            )
            yield Found(name=name, setting=setting, n=hot, n_plain=plain)


def _summary(found: list[Found]) -> Iterator[str]:
    saved = [1 - each.n / each.n_plain for each in found if each.n and each.n_plain]
    fits = sum(each.n is not None and each.n <= each.setting.room() for each in found)
    n, gains = [each.at for each in found], [each.gain(each.at) for each in found]
    left = [each.setting.bubble(each.at, False) for each in found]
    attention = [each.attention_share() for each in found]
    yield (
        f"The copies are hidden from n = {min(n)} to {max(n)} batches on, "
        f"{digits(min(gains))} to {digits(max(gains))} times as fast as sequential loading; hot "
        f"first needs {_percent(min(saved))} to {_percent(max(saved))} fewer batches than number "
        f"order, which at this n leaves a bubble of {_percent(min(left))} to "
        f"{_percent(max(left))}. "
        f"Attention is {_percent(min(attention))} to {_percent(max(attention))} of the compute "
        f"that hides the copies. The KV cache of so many requests fits in HBM in {fits} of "
        f"{len(found)} settings."
    )


def _curve(setting: Setting) -> Iterator[list[str]]:
    for n in (m for m in CURVE_BATCHES if m <= setting.draw.largest):
        hot, plain = setting.tokens_per_s(n), setting.tokens_per_s(n, False)
        yield [
            str(n),
            _percent(setting.bubble(n)),
            _percent(setting.bubble(n, False)),
            digits(hot / setting.sequential_tokens_per_s()),
            f"{hot / plain:.3f}",
        ]


def _percent(share: float) -> str:
    return f"{abs(100 * share):.1f} %"  # rounding can leave -0.0


OPENING = f"""\
# Klotski as a study

Written by `python -m train.studies.klotski`. Label: **mechanism**; every number is modeled.

## What the paper does

Klotski (arXiv 2502.06888, ASPLOS'25) loads experts that do not fit on the GPU, and lets a group of
n batches pass each layer together: a copy serves all of them, and their compute hides it. n is the
smallest that leaves the GPU no bubble; hot experts are computed first, cold ones as they arrive.
It is a schedule, not a placement: a recording replayed step by step fixes the batch, so it is no
policy.

## The rule here

Per layer, for a group of n batches of B requests (functions of `ndp_gym.cost`, in
`LayerWork` of `train/studies/pipeline.py`):

- GPU: `n * attention_s`, then each used expert once for the tokens of all batches,
  `gpu_experts_s(1 expert, its tokens)`; resident (hot) ones first, then in the order of arrival.
  The control computes in the order of expert numbers.
- Link: `transfer_s(expert_bytes)` per used expert that is not resident, one after the other, each
  as soon as the attention of the first batch that needs it is done; busiest first among those
  known at the same time (by number in the control).
- Bubble = time of the layer - GPU time. n is the smallest with a bubble share of at most
  {HIDDEN:.0%} over all layers (`smallest_n`).
- Sequential loading: one batch, attention + all copies + experts, nothing overlapped.
- Tokens per second add `lm_head_s`, `engine_s` and dense layers, once per batch.

Assumed: {RESIDENT_SHARE:.0%} of the experts of each layer reside (the most used of the train
split); {CONTEXT} tokens of context per request; rows of a group are drawn from the decode rows of
test requests with replacement ({N_GROUPS} groups, seed 0), since there are more of them than
recorded requests; nothing is copied before the layer begins (the paper also prefetches hot experts
and the gate one layer ahead); copies go into free HBM that is not counted; the KV cache costs no
link time even where it does not fit (*KV fits n* is the n up to which it does, beside dense weights
and resident experts; the last column is the speed-up at the smaller of the two).

## Against the published numbers

Mixtral-8x22B on H800, tokens per second: 1.149 without the pipeline, 34.07 with several batches
(x 29.7), 44.17 with hot experts prefetched (x 1.30), 52.85 with reordering (x 1.20), 53.1
quantized. Batch, context and memory of these rows are not known here, and there is no such
recording: none is reproduced. In kind they agree: sharing a copy among batches brings a factor of
tens, the order some percent, and nothing once n is large. The n below are large because
a decode step computes little per token, and a group of so many requests needs more KV cache than
HBM has in most settings: the *x sequential there* column is what remains.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    return write_study("klotski", OPENING, section, argv)


if __name__ == "__main__":
    sys.exit(main())
