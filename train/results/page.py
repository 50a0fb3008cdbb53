"""``docs/results.md``: the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ndp_gym.statistics import (
    interquartile_mean,
    interquartile_mean_interval,
    probability_of_improvement,
)
from train.results.conditions import AGENTS, EPISODE_SEED, FORECAST, Measured, Row
from train.results.contenders import Folders
from train.results.fronts import (
    AGENT_PRICES,
    BUDGETS,
    PRICES,
    gain_over_range,
    gains_at_budgets,
)
from train.results.opened import Opening, provenance
from train.results.resampling import interval
from train.results.words import cautions, gain_of, percent_of, summary

TITLES = {
    "fix": "`fix`: the default environment",
    "rand": "`rand`: another machine, batch, budget and quality weight in every episode",
    "hidden": "`hidden`: the same, and GPU, far device and link slower than anybody is told",
    "drift": "`drift`: the same as `rand`, and things change on the way",
}
OPENING = """\
# Learned agents beside tuned heuristics

Written by

    {command}

from the agents in `{agents}` and the tunings in `{tunings}`. Those that ship are made by
`train/reproduce.sh`. All seconds are modeled, all losses predicted.
{trial}
How to read it. Every policy decodes the same {episodes} {split} episodes per condition, 64 windows
of 16 steps each, on the bundled recording ({conversations} {split} conversations). In a window all
of them face the same tokens, so differences are paired. *speed-up* is over all experts far at 4
bit, the geometric mean over windows; *ΔNLL* is nats over that reference. Constants were tuned on
train; the best of several tunings and of an agent's checkpoints was picked on val, and nothing on
test; how often this page was made of it is counted below. 95 % intervals resample episodes,
conversations and, of agents, training seeds (pigeonhole bootstrap: on the wide side).
*At equal ΔNLL*: throughput over that of the best heuristic at the same loss. For this it is run at
{prices} prices of a second, and read on the concave hull of that curve: what it reaches by
alternating between two prices. A dash where the row is off the curve. *won*: episodes with a higher
reward. `oracle_balance` sees the next window; it is no bound. The small tables run agents at
{agent_prices} of the prices, which errs to their disadvantage, and compare hull with hull: at
budgets of ΔNLL over the reference, and as the geometric mean over all losses that both reach, which
is the difference of their hypervolumes. Rewards are means over windows. Under `rand`, `hidden` and
`drift` the same batches, budgets, links and requests are drawn: these are not three independent
trials.

*Regret* is the reward that a row leaves, to the plan that a clairvoyant local search finds for the
window (`ndp_gym.local_search`) and to a proved bound (`ndp_gym.bound`), both with copies that
arrive for free. They take half a minute a window, so regret is the mean over {sampled} windows of
a section (± its standard error), one in each of as many episodes, the same for all rows: too few to
rank rows that are close.
Machines that drift are no obstacle: every window is bounded for the machine and the HBM that it ran
on.

*forecast alone* is the agents' files without their networks (`agent:path=rand_0,network=False`):
what is left is the planner they bend and their fitted forecast of routing. Every agent bends the
tuned `balance_feedback`; the windows that agents and tunings had stand in `train/experiments` and
`train/reproduce.sh`.
"""
HEAD = (
    "policy | reward (95 %) | gain over best heuristic (95 %) | won | speed-up | ΔNLL | "
    "throughput at equal ΔNLL (95 %) | regret to search | regret to bound | ms / decision"
)


def page(
    measured: Sequence[Measured],
    split: str,
    noted: list[Opening],
    commit: str | None,
    command: str,
    folders: Folders,
) -> str:
    """The whole page, made by ``command`` from what is in ``folders``."""
    first = measured[0]
    trial = "" if split == "test" else f"\n**A trial on {split}, not to be quoted.**\n"
    opening = OPENING.format(
        episodes=first.n_episodes, conversations=first.n_conversations, prices=len(PRICES),
        agent_prices=len(AGENT_PRICES), split=split, trial=trial, sampled=len(first.sample),
        command=command, agents=folders.agents, tunings=folders.tunings,
    )  # fmt: skip
    lines = [opening, *cautions(measured), "", *summary(measured), ""]
    lines += ["![reward on val while agents train](img/results-learning.svg)", ""]
    lines += [line for each in measured for line in _section(each)]
    return "\n".join([*lines, *_provenance(first, noted, commit)]).rstrip() + "\n"


def _section(measured: Measured) -> Iterator[str]:
    conditions, _, weight = measured.section.partition(":")
    yield f"## {TITLES[conditions]}" + (f", quality weight `{weight}`" if weight else "")
    yield ""
    yield from _chosen(measured, weight)
    yield ""
    columns = HEAD.split(" | ")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in sorted(measured.rows, key=lambda row: -row.reward[0]):
        yield f"| {' | '.join(_cells(row, measured.best))} |"
    yield ""
    yield from _budgets(measured)
    agents, best = measured.row(AGENTS), measured.row(measured.best)
    if agents is not None and best is not None and agents.n_seeds > 1:
        yield from _seeds(agents, best)


def _seeds(agents: Row, best: Row) -> Iterator[str]:
    """What training seeds reach one by one, episodes alike, and robust figures over both."""
    gains = agents.rewards - best.rewards
    low, high = interquartile_mean_interval(gains)
    chance = probability_of_improvement(agents.rewards, best.rewards)
    each = ", ".join(f"{gain:+.4f}" for gain in gains.mean(axis=1))
    yield (
        f"Training seeds of the agents, gain over the best heuristic, episodes alike: {each}. Over "
        f"seeds and episodes: interquartile mean {interquartile_mean(gains):+.4f} ({low:+.4f} to "
        f"{high:+.4f}), probability of improvement {chance:.0%}."
    )
    yield ""


def _budgets(measured: Measured) -> Iterator[str]:
    """Agents against the heuristic where both pay the same loss."""
    if measured.agents_curve is None:
        return
    curves = measured.agents_curve, measured.curve
    cells = [percent_of(gain) for gain in (*gains_at_budgets(*curves), gain_over_range(*curves))]
    heads = [f"{budget:g} nats" for budget in BUDGETS]
    yield f"| agents over `{measured.best}`, throughput | {' | '.join(heads)} | all losses |"
    yield f"|{'---|' * (len(cells) + 1)}"
    yield f"| at ΔNLL | {' | '.join(cells)} |"
    yield ""


def _chosen(measured: Measured, weight: str) -> Iterator[str]:
    """How the best heuristic was chosen."""
    if weight:
        scores = ", ".join(f"`{name}` {value:.4f}" for name, value in measured.val.items())
        yield (
            "Nothing was tuned or trained for this weight alone: heuristics have the constants "
            "tuned at `balanced`, agents saw all three weights while they trained. Reward on val "
            f"at this weight: {scores}. Best: `{measured.best}`."
        )
        return
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
    name = f"**{row.name}**" if row.name == AGENTS else row.name
    return [
        name if row.name in (AGENTS, FORECAST) else f"`{name}`",
        f"{row.reward[0]:.4f} ({low:.3f} to {high:.3f})",
        "-" if is_best else gain_of(row.gain),
        "-" if is_best else f"{row.won:.0%}",
        f"{np.exp(row.speed[0]):.3f}",
        f"{row.loss[0]:+.4f}",
        "-" if is_best else percent_of(row.equal),
        *map(_regret, row.regret),
        f"{1e3 * row.decision_s:.1f}",
    ]


def _regret(found: tuple[float, float]) -> str:
    mean, error = found
    return "-" if np.isnan(mean) else f"{mean:.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")


def _provenance(first: Measured, noted: list[Opening], commit: str | None) -> Iterator[str]:
    sentences = (
        f"Episodes are drawn with seed {EPISODE_SEED}. Commits and recordings that the agents and",
        "the tunings come from stand in their cards.",
    )
    facts = f" Recording sha256 `{first.trace_sha256}`."
    opened = "Test was opened {} times (`train/results/opened.json`)"
    yield from provenance(commit, facts, sentences, opened, noted)
