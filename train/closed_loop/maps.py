"""Bit maps to be measured: at equal mean bits, uniform, and as policies made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.closed_loop.copies import FULL, BitMap

MEANS = (2.0, 2.5, 3.0, 3.5)
LADDER = (1, 2, 3, 4)
UNIFORM = (8, 4, 3, 2, 1)
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Map:
    """A bit map, the stratum it is compared in, and how it came about."""

    stratum: str
    kind: str
    bits: BitMap

    @property
    def mean_bits(self) -> float:
        """Over all experts."""
        return float(self.bits.mean())


def equal_bits(popularity: FloatArray, error_saved: FloatArray, seed: int = 0) -> Iterator[Map]:
    """Maps with exactly the same mean bits within each stratum of `MEANS`.

    Args:
        popularity: [L, E] share of a layer's gate energy; hot experts get more or fewer bits.
        error_saved: [L, E] predicted loss per expert at 1 bit; those that lose most get more bits.
        seed: of random scores.
    """
    rng = np.random.default_rng(seed)
    n_layers, n_experts = popularity.shape

    def by_layer(score: FloatArray) -> FloatArray:
        return np.repeat(score[:, None], n_experts, axis=1) + rng.random(popularity.shape) * 1e-6

    depth = np.arange(n_layers, dtype=np.float64)
    for mean in MEANS:
        scores: list[tuple[str, FloatArray]] = [
            ("random", rng.random(popularity.shape)),
            ("random", rng.random(popularity.shape)),
            ("hot high", popularity),
            ("hot low", -popularity),
            ("sensitive high", error_saved),
            ("first layers high", by_layer(-depth)),
            ("last layers high", by_layer(depth)),
            ("outer layers high", by_layer(np.abs(depth - depth.mean()))),
            ("random layers high", by_layer(rng.permutation(depth))),
            ("random layers high", by_layer(rng.permutation(depth))),
        ]
        for kind, score in scores:
            low, high = rng.permutation(_mixes(mean))[0]
            yield Map(
                stratum=f"mean {mean:g}",
                kind=f"{kind} ({high}/{low} bits)",
                bits=_two_widths(score, int(low), int(high), mean),
            )
        for kind, score in (("hot", popularity), ("random", rng.random(popularity.shape))):
            yield Map(
                stratum=f"mean {mean:g}",
                kind=f"{kind} first, all widths",
                bits=_all_widths(score, mean, rng),
            )
        for kind, score in (("layers", by_layer(rng.permutation(depth))), ("hot", popularity)):
            yield Map(
                stratum=f"mean {mean:g}",
                kind=f"{kind} {FULL}/1 bits",
                bits=_two_widths(score, 1, FULL, mean),
            )


def uniform(shape: tuple[int, int]) -> Iterator[Map]:
    """Every expert at the same width."""
    for bits in UNIFORM:
        yield Map(stratum="uniform", kind=f"{bits} bits", bits=np.full(shape, bits, np.uint8))


def _mixes(mean: float) -> list[tuple[int, int]]:
    """Pairs (low, high) of widths with low < mean < high."""
    return [(lo, hi) for lo in LADDER for hi in LADDER if lo < mean < hi]


def _two_widths(score: FloatArray, low: int, high: int, mean: float) -> BitMap:
    """The best of ``score`` at ``high`` bits, one between if need be, the rest at ``low``."""
    total = round(mean * score.size) - low * score.size
    n_high, rest = divmod(total, high - low)
    bits = np.full(score.size, low)
    order = np.argsort(-score, axis=None, kind="stable")
    bits[order[:n_high]] = high
    while rest > 0:  # the widths between that exist
        step = min(rest, max(LADDER) - low)
        bits[order[n_high]] += step
        n_high, rest = n_high + 1, rest - step
    return bits.reshape(score.shape).astype(np.uint8)


def _all_widths(score: FloatArray, mean: float, rng: np.random.Generator) -> BitMap:
    """Widths 1 to 4 in random proportions, falling with ``score``."""
    bits = np.sort(rng.choice(LADDER, score.size, p=rng.dirichlet(np.ones(len(LADDER)))))[::-1]
    off = round(mean * score.size) - int(bits.sum())
    while off != 0:
        place = rng.integers(score.size)
        if min(LADDER) <= bits[place] + np.sign(off) <= max(LADDER):
            bits[place] += np.sign(off)
            off -= int(np.sign(off))
    result = np.empty(score.size, np.uint8)
    result[np.argsort(-score, axis=None, kind="stable")] = np.sort(bits)[::-1]
    return result.reshape(score.shape)
