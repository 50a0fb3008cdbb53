"""One recording: fit on one half, draw as much as the other half, compare; and the control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ndp_gym.synthesize import Generator, Shape, fit_profile
from ndp_gym.trace import RoutingTrace
from train.synthetic.halves import halves, is_by_conversation
from train.synthetic.measures import Values, speeds, statistics

SEED = 1  # of what is drawn
SPEED_SPLITS = 4  # splits whose speeds are measured
FLOOR, FLOOR_SHARE = 0.01, 0.02  # of a tolerance: in the statistic's own unit, of its value


@dataclass(frozen=True, kw_only=True)
class Line:
    """One statistic of the held-out half, of what was drawn, and of the control.

    Attributes:
        name: of the statistic.
        first: of the half that was fitted.
        real: of the half that was held out.
        synthetic: of what was drawn; NaN where it has none.
        control: of independent tokens; NaN where it has none.
        tolerance: the largest difference of two halves, over the splits, or the floor.
    """

    name: str
    first: float
    real: float
    synthetic: float
    control: float
    tolerance: float

    @property
    def narrow(self) -> float:
        """The difference of the two halves of this one split, or the floor."""
        return max(abs(self.first - self.real), floor(self.name, self.real))

    def within(self, value: float, tolerance: float) -> bool:
        """Whether a value is as near the held-out half as ``tolerance`` says; NaN is not."""
        return abs(value - self.real) <= tolerance


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All lines of a recording, and how it was halved."""

    title: str
    by_conversation: bool
    n_splits: int
    n_rows: tuple[int, int]
    n_requests: tuple[int, int]
    lines: tuple[Line, ...]

    def passed(self, which: str, *, narrow: bool = False) -> int:
        """Statistics within tolerance of ``first``, ``synthetic`` or ``control``."""
        return sum(
            line.within(getattr(line, which), line.narrow if narrow else line.tolerance)
            for line in self.lines
        )


def compare(title: str, trace: RoutingTrace) -> Comparison:
    """Fit, draw and measure; every split into halves gives a difference, one split is compared."""
    splits = list(halves(trace))
    fitted, held_out = splits[0]
    drawn, control = synthetic_like(fitted, held_out), independent_like(fitted, held_out)
    first, real = _measured(fitted), _measured(held_out)
    noise = {name: [abs(first[name] - real[name])] for name in real if name in first}
    for number, pair in enumerate(splits[1:], 1):
        a, b = (statistics(half, loops=False) for half in pair)
        if number < SPEED_SPLITS:
            a, b = a | speeds(pair[0]), b | speeds(pair[1])
        for name in noise.keys() & a.keys() & b.keys():
            noise[name].append(abs(a[name] - b[name]))
    ours, theirs = _measured(drawn), _measured(control)
    lines = tuple(
        Line(
            name=name,
            first=first[name],
            real=value,
            synthetic=ours.get(name, np.nan),
            control=theirs.get(name, np.nan),
            tolerance=max(*noise[name], floor(name, value)),
        )
        for name, value in real.items()
        if name in noise
    )
    return Comparison(
        title=title,
        by_conversation=is_by_conversation(trace),
        n_splits=len(splits),
        n_rows=(fitted.n_rows, held_out.n_rows),
        n_requests=(len(fitted.requests), len(held_out.requests)),
        lines=lines,
    )


def floor(name: str, value: float) -> float:
    """Least tolerance of a statistic; of speeds a share alone."""
    return FLOOR_SHARE * abs(value) if "tokens/s" in name else max(FLOOR, FLOOR_SHARE * abs(value))


def synthetic_like(fitted: RoutingTrace, held_out: RoutingTrace) -> RoutingTrace:
    """Requests as long as those held out, drawn from the profile of the other half."""
    shape = Shape(n_layers=fitted.n_layers, n_experts=fitted.n_experts, top_k=fitted.top_k)
    pieces = list(Generator(fit_profile(fitted), shape, seed=SEED).pieces(held_out.requests))
    gates = [p.gate_weights for p in pieces if p.gate_weights is not None]
    return RoutingTrace.from_arrays(
        np.concatenate([piece.expert_ids for piece in pieces]),
        held_out.requests,
        held_out.metadata,
        gate_weights=np.concatenate(gates) if gates else None,
    )


def independent_like(fitted: RoutingTrace, held_out: RoutingTrace) -> RoutingTrace:
    """The control: every token and layer takes the experts of a random token of the fitted half.

    It has the popularity of every layer, pooled, and no request, domain, time or coupling.
    """
    rng = np.random.default_rng(SEED)
    size = (held_out.n_rows, fitted.n_layers)
    rows, layers = rng.integers(fitted.n_rows, size=size), np.arange(fitted.n_layers)
    gates = fitted.gate_weights
    return RoutingTrace.from_arrays(
        fitted.expert_ids[rows, layers],
        held_out.requests,
        held_out.metadata,
        gate_weights=None if gates is None else gates[rows, layers],
    )


def _measured(trace: RoutingTrace) -> Values:
    return {**statistics(trace, loops=True), **speeds(trace)}
