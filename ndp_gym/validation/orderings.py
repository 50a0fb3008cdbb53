"""Whether the model ranks systems and placements as the measurements do (Kendall's tau).

Only pairs that differ by more than 5 % in the measurement count; ties of ours count as wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

from ndp_gym.validation import cpu_offload, in_hbm, sweep
from ndp_gym.validation.targets import target

THRESHOLD = 0.05


class Ordering(NamedTuple):
    """Agreement of pairs in one comparison."""

    name: str
    n_pairs: int
    n_agree: int

    @property
    def tau(self) -> float | None:
        """Agreeing minus disagreeing pairs over all pairs; ``None`` without pairs."""
        return (2 * self.n_agree - self.n_pairs) / self.n_pairs if self.n_pairs else None


class Pair(NamedTuple):
    """One thing measured and modelled, in any unit."""

    measured: float
    ours: float


def compare(name: str, groups: Iterable[Iterable[Pair]]) -> Ordering:
    """Agreement over all pairs inside each group."""
    n_pairs = n_agree = 0
    for group in groups:
        for a, b in combinations(group, 2):
            low, high = sorted((a.measured, b.measured))
            if high > low * (1 + THRESHOLD):
                n_pairs += 1
                n_agree += (a.measured - b.measured) * (a.ours - b.ours) > 0
    return Ordering(name, n_pairs, n_agree)


def orderings() -> list[Ordering]:
    """Placement policies at equal residency, CPU-offload engines, models and GPUs in HBM."""
    low = sweep.SHARES <= 0.6
    return [
        compare("placement policies at equal share", _placements(range(len(sweep.SHARES)))),
        compare("- up to 60 % on the GPU", _placements(low.nonzero()[0].tolist())),
        compare("- above 60 %", _placements((~low).nonzero()[0].tolist())),
        compare("CPU-offload engines", [_offload_engines()]),
        compare("models and GPUs in HBM at equal batch", _in_hbm().values()),
    ]


def _placements(indices: Iterable[int]) -> list[list[Pair]]:
    ours = {policy: sweep.tokens_per_s(policy) for policy in sweep.MEASURED}
    return [
        [Pair(speeds[i + 1], float(ours[policy][i])) for policy, speeds in sweep.MEASURED.items()]
        for i in indices
    ]


def _offload_engines() -> list[Pair]:
    rows = cpu_offload.rows()
    return [
        Pair(target(name).published, ours)
        for name, ours in rows.items()
        if target(name).kind != "bound"
    ]


def _in_hbm() -> Mapping[int, list[Pair]]:
    """Pairs by batch size; routing is taken as uniform throughout."""
    groups: dict[int, list[Pair]] = {}
    for served in (*in_hbm.CALIBRATED, *in_hbm.TRACED):
        for batch in served.batches:
            pair = Pair(target(served.target(batch)).published, served.step_s(batch))
            groups.setdefault(batch, []).append(pair)
    return groups
