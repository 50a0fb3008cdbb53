"""``docs/results.md``: the tables, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from train.results.conditions import Measured, Row
from train.results.fronts import BUDGETS, PRICES, Gain, gain_over_range, gains_at_budgets
from train.results.resampling import interval

TITLES = {
    "fix": "`fix`: the default environment",
    "rand": "`rand`: another machine, batch, budget and quality weight in every episode",
    "hidden": "`hidden`: the same, and GPU, far device and link slower than anybody is told",
    "drift": "`drift`: the same as `rand`, and things change on the way",
}
OPENING = """\
# Learned agents beside tuned heuristics

Written by `python -m train.results` from the agents in `policies/agents` and the tunings in
`policies/tunings`, which `train/reproduce.sh` makes. All seconds are modeled, all losses predicted.

How to read it. Every policy decodes the same {episodes} test episodes per condition, 64 windows of
16 steps each, on the bundled recording ({conversations} test conversations). In a window all of
them face the same tokens, so differences are paired. *speed-up* is over all experts far at 4 bit,
the geometric mean over windows; *ΔNLL* is nats over that reference. Constants were tuned on train;
the best of several tunings and of an agent's checkpoints was picked on val; test was opened for
this page only. 95 % intervals resample episodes, conversations and, of agents, training seeds
(pigeonhole bootstrap: on the wide side). *At equal ΔNLL*: throughput over that of the best tuned
heuristic, run at {prices} prices of a second and interpolated at the row's own loss; a dash where
the row is off that curve. *won*: episodes with a higher reward. `oracle_balance` sees the next
window; it is no bound. The small tables run agents at the same prices too and compare curve with
curve: at budgets of ΔNLL over the reference, and as the geometric mean over all losses that both
reach, which is the difference of their hypervolumes.

Under `fix` the agents are those that were trained under `rand`. Every agent bends the tuned
`balance_feedback`; the windows that agents and tunings had stand in `train/experiments` and
`train/reproduce.sh`.

## What not to conclude

- One small model's routing with the sizes of a 16B-class model, and {conversations} test
  conversations: agents for your model have to be trained on its recording.
- The lead is about half a percent of throughput, small beside what tuning brings (`fix`) and beside
  what `oracle_balance` gains by knowing the next window. Nearly all of it is the fitted forecast:
  on val, agents without their network gain almost as much; what reinforcement learning adds is
  within the noise.
- Conditions are drawn from ranges that are partly assumed (`ndp_gym/conditions.py`).
"""
HEAD = (
    "policy | reward (95 %) | gain over best tuned (95 %) | won | speed-up | ΔNLL | "
    "throughput at equal ΔNLL (95 %) | ms / decision"
)


def page(measured: Sequence[Measured]) -> str:
    """The whole page."""
    first = measured[0]
    opening = OPENING.format(
        episodes=first.n_episodes, conversations=first.n_conversations, prices=len(PRICES)
    )
    sections = [line for each in measured for line in _section(each)]
    return "\n".join([opening, *_summary(measured), *sections]).rstrip() + "\n"


def _summary(measured: Sequence[Measured]) -> Iterator[str]:
    yield "## In short"
    yield ""
    for each in measured:
        agents = next((row for row in each.rows if row.seeds), None)
        if agents is None:
            yield f"- `{each.conditions}`: no agents."
            continue
        yield (
            f"- `{each.conditions}`: layer agents ({len(agents.seeds)} seeds) against "
            f"`{each.best}`: reward {_gain(agents.gain)}, throughput at equal ΔNLL "
            f"{_percent(agents.equal)}; {_verdict(agents.gain)}."
        )
    yield ""
    yield "![reward on val while agents train](img/results-learning.svg)"
    yield ""


def _verdict(gain: Gain) -> str:
    if gain.low > 0:
        return "the agents are better"
    return "the heuristic is better" if gain.high < 0 else "no difference is shown"


def _section(measured: Measured) -> Iterator[str]:
    yield f"## {TITLES[measured.conditions]}"
    yield ""
    yield from _tuned(measured)
    yield ""
    columns = HEAD.split(" | ")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in sorted(measured.rows, key=lambda row: -row.reward[0]):
        yield f"| {' | '.join(_cells(row, measured.best))} |"
    yield ""
    yield from _budgets(measured)
    for row in measured.rows:
        if row.seeds:
            seeds = ", ".join(f"{reward:.4f}" for reward in row.seeds)
            yield f"Training seeds of the agents, reward: {seeds}."
            yield ""


def _budgets(measured: Measured) -> Iterator[str]:
    """Agents against the heuristic where both pay the same loss."""
    if measured.agents_curve is None:
        return
    curves = measured.agents_curve, measured.curve
    cells = [_percent(gain) for gain in (*gains_at_budgets(*curves), gain_over_range(*curves))]
    heads = [f"{budget:g} nats" for budget in BUDGETS]
    yield f"| agents over `{measured.best}`, throughput | {' | '.join(heads)} | all losses |"
    yield f"|{'---|' * (len(cells) + 1)}"
    yield f"| at ΔNLL | {' | '.join(cells)} |"
    yield ""


def _tuned(measured: Measured) -> Iterator[str]:
    spreads = "; ".join(
        f"`{name}` {tuning['scores']['reward']:.4f} "
        f"(untuned {tuning['scores']['reward_untuned']:.4f}, "
        f"spread of {len(tuning['tunings'])} tunings {tuning['scores']['spread_of_tunings']:.4f})"
        for name, tuning in measured.tunings.items()
    )
    yield f"Tuned, reward on val: {spreads}. Best: `{measured.best}`."


def _cells(row: Row, best: str) -> list[str]:
    low, high = interval(row.reward)
    is_best = row.name == best
    return [
        f"**{row.name}**" if row.seeds else f"`{row.name}`",
        f"{row.reward[0]:.4f} ({low:.3f} to {high:.3f})",
        "-" if is_best else _gain(row.gain),
        "-" if is_best else f"{row.won:.0%}",
        f"{np.exp(row.speed[0]):.3f}",
        f"{row.loss[0]:+.4f}",
        "-" if is_best else _percent(row.equal),
        f"{1e3 * row.decision_s:.1f}",
    ]


def _gain(gain: Gain) -> str:
    return f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def _percent(gain: Gain) -> str:
    if not np.isfinite(gain.value):
        return "-"
    return f"{gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
