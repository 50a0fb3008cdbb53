"""What the tables of ``docs/results.md`` say, in sentences made from their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from train.results.conditions import AGENTS, FORECAST, Measured
from train.results.fronts import Gain


def summary(measured: Sequence[Measured]) -> Iterator[str]:
    """One line for every section, and what of the gain is the network's."""
    yield "## In short"
    yield ""
    for each in measured:
        agents, forecast = each.row(AGENTS), each.row(FORECAST)
        if agents is None:
            yield f"- `{each.section}`: no agents."
            continue
        yield (
            f"- `{each.section}`: layer agents ({seeds_of(agents.n_seeds)}) against "
            f"`{each.best}`: reward {gain_of(agents.gain)}, throughput at equal ΔNLL "
            f"{percent_of(agents.equal)}; {_verdict(agents.gain, each.spread)}."
        )
        if forecast is not None and each.network is not None:
            yield (
                f"  Their forecast alone: reward {gain_of(forecast.gain)}; the network adds "
                f"{gain_of(each.network)}, {_of_network(each.network)}."
            )


def cautions(measured: Sequence[Measured]) -> Iterator[str]:
    """What a reader should not conclude."""
    yield "## What not to conclude"
    yield ""
    yield (
        "- One small model's routing with the sizes of a 16B-class model, and "
        f"{measured[0].n_conversations} conversations: agents for your model have to be trained on "
        "its recording."
    )
    leads = [row.equal.value for each in measured if (row := each.row(AGENTS)) is not None]
    seen = [row.equal.value for each in measured if (row := each.row("oracle_balance")) is not None]
    if np.isfinite(leads).any() and np.isfinite(seen).any():
        yield (
            f"- The agents' lead at equal ΔNLL is {_span(leads)} of throughput, that of "
            f"`oracle_balance`, which only knows the next window, {_span(seen)}."
        )
    networks = {each.section: each.network for each in measured if each.network is not None}
    useless = [f"`{name}`" for name, gain in networks.items() if gain.low <= 0]
    if useless:
        yield (
            "- Learning by trial is not shown to add anything to the fitted forecast under "
            f"{', '.join(useless)}."
        )
    yield "- Conditions are drawn from ranges that are partly assumed (`ndp_gym/conditions.py`)."


def gain_of(gain: Gain) -> str:
    """A difference of rewards with its interval."""
    return f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def percent_of(gain: Gain) -> str:
    """A relative difference with its interval; a dash where there is none."""
    if not np.isfinite(gain.value):
        return "-"
    return f"{gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"


def seeds_of(n: int) -> str:
    """The number of training seeds in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


def _verdict(gain: Gain, spread: float) -> str:
    """In words; ``spread`` is that of the heuristic's tunings on val, nan where it has none."""
    if gain.low > 0:
        small = f", by less than the spread of its tunings ({spread:.4f})"
        return "the agents are better" + (small if gain.value <= spread else "")
    return "the heuristic is better" if gain.high < 0 else "no difference is shown"


def _of_network(gain: Gain) -> str:
    if gain.low > 0:
        return "more than noise"
    return "a loss" if gain.high < 0 else "within the noise"


def _span(values: Sequence[float]) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:+.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:+.1%} to {high:+.1%}"
