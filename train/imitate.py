"""Teach layer agents what a clairvoyant planner does: ``python -m train.imitate``.

`oracle_balance` plans on the true counts of the coming window. Which experts it picks looks
arbitrary where both devices cost the same, so an agent does not learn its placements but, layer by
layer, *how much* it puts in HBM and at how many bits: of a grid of actions, those count whose
plan has the same share of tokens in HBM and the same mean width. In the first round the planner
acts, afterwards the agent does, so that it learns in the states it gets into. The result is where
``train.ppo`` may start from:

    python -m train.imitate --out runs/imitate
    python -m train.ppo --init runs/imitate/best
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ndp_gym.agent_file import Agent, save_agent
from ndp_gym.forecast import Forecast
from ndp_gym.layer_agents import ACTIONS, LayerAgents
from ndp_gym.layer_features import FEATURES
from ndp_gym.layer_forecast import learned_of
from ndp_gym.plan import HBM, Placement, Plan
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.provenance import git_commit, package_versions
from ndp_gym.report import check_writable
from ndp_gym.rollout import run_policy
from ndp_gym.rules import check_numbers
from policies.agent import LayerAgent
from policies.balance_feedback import BalanceFeedback
from policies.oracle_balance import OracleBalance
from policies.tuned import read_tuning
from train import options, setting
from train.forecast import fit_weights
from train.networks import layers_of
from train.setting import (
    Setting,
    episodes_of,
    mean_of,
    scores_of,
    traces_of,
    val_tasks,
    window_rewards,
)

FloatArray = NDArray[np.float64]

GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Values of ``far_value`` and ``price`` that are tried; the other actions stay 0."""
SHARPNESS = 50.0
"""An action that misses by 1/50 more (share of tokens, or octaves of width) counts e times less."""


@dataclass(frozen=True, kw_only=True)
class Args(Setting):
    """What a run is; every field is an option of the command."""

    out: str = "runs/imitate"
    """folder for the agent"""
    base: str | None = None
    """tuning whose constants teacher and planner have (default: untuned)"""
    n_rounds: int = 3
    """rounds of collecting and fitting; the agent acts from the second on"""
    n_windows: int = 1_000
    """decode windows per recording and round"""
    n_epochs: int = 30
    """passes over all samples per round"""
    minibatch: int = 256
    """samples per gradient step"""
    learning_rate: float = 1e-3
    """of Adam"""
    hidden: int = 64
    """width of the two hidden layers"""


NUMBERS = {
    **setting.NUMBERS,
    **dict.fromkeys(("n_rounds", "n_windows", "n_epochs", "minibatch", "hidden"), "at least 1"),
    "learning_rate": "finite and > 0",
}
"""What the numbers of `Args` may be."""


class OracleLesson(OracleBalance):
    """Plans like `oracle_balance` and notes, for every layer, what an agent saw and should do.

    Args:
        agent: who acts; ``None``: the oracle itself.
        base: constants of the oracle and of the planner that agents bend, as of `balance_feedback`.
        forecast: weights [5, 6] of the agents' forecast.
    """

    def __init__(
        self,
        agent: Agent | None = None,
        base: Mapping[str, float] | None = None,
        forecast: FloatArray | None = None,
    ) -> None:
        """Nothing noted."""
        self.base, self.weights = dict(base or {}), forecast
        super().__init__(**{k: v for k, v in self.base.items() if k != "gain"})
        self.agent = agent
        self.features: list[NDArray[np.float32]] = []
        self.labels: list[FloatArray] = []

    def reset(self, context: PolicyContext) -> None:
        """A new episode; notes are kept."""
        super().reset(context)
        pairs = list(itertools.product(GRID, GRID))
        self.actions = np.zeros((len(pairs) + 1, context.model.n_layers, len(ACTIONS)))
        self.actions[:-1, :, :2] = np.array(pairs)[:, None]
        self.layers = LayerAgents(
            context.model, context.system, context.quality, context.quality_weight, context.window,
            n_lanes=len(self.actions), profile=context.profile, base=self.base,
            learned=learned_of(self.weights, context.patterns()),
        )  # fmt: skip

    def expect(self, observation: Observation) -> Forecast:
        """What the planner expects; kept, to weigh experts by it."""
        self.expected = super().expect(observation)
        return self.expected

    def __call__(self, observation: Observation) -> Plan:
        """The plan that runs."""
        wanted = super().__call__(observation)
        n_lanes = len(self.actions)
        copies = {
            name: np.broadcast_to(array, (n_lanes, *array.shape))
            for name, array in observation.items()
        }
        features = self.layers.observe(copies)[0]
        if self.agent is not None:
            self.actions[-1] = self.agent(features)
        tier, bits, order, services = self.layers.decide(self.actions)
        placement = wanted.placement
        misses = missed(
            self.expected.load, (tier[:-1], bits[:-1]), (placement.tier, placement.bitwidth)
        )
        weights = np.exp(-SHARPNESS * (misses - misses.min(axis=0)))
        labels = (weights[..., None] * self.actions[:-1]).sum(axis=0)
        self.features.append(features)
        self.labels.append(labels / weights.sum(axis=0)[:, None])
        if self.agent is not None:
            placement = Placement(tier=tier[-1], bitwidth=bits[-1])
            wanted = Plan(placement=placement, migration_order=order[-1], service=services[-1])
            self.planned = bits[-1].astype(np.int64)
        shape = tier.shape
        self.layers.ordered(
            np.broadcast_to(placement.tier, shape), np.broadcast_to(placement.bitwidth, shape)
        )
        return wanted


def missed(load: FloatArray, plans: tuple[Any, Any], wanted: tuple[Any, Any]) -> FloatArray:
    """[C, L] distance of ``plans`` (tier, bits [C, L, E]) from the plan ``wanted`` [L, E].

    That of the shares of tokens in HBM, plus that of the mean widths in octaves.
    """
    weights = load / load.sum(axis=-1, keepdims=True)
    sums = [
        ((weights * (tier == HBM)).sum(axis=-1), (weights * np.log2(bits)).sum(axis=-1))
        for tier, bits in (plans, wanted)
    ]
    (share, width), (wanted_share, wanted_width) = sums
    missed: FloatArray = np.abs(share - wanted_share) + np.abs(width - wanted_width)
    return missed


def imitate(args: Args) -> Path:
    """Teach and return the path of the best agent's weights.

    Raises:
        ValueError: an option is out of range, or names what is no tuning or recording.
        OSError: a file cannot be read or written.
    """
    torch.set_num_threads(1)
    check_numbers(args, NUMBERS)
    check_writable(Path(args.out) / "best.json")
    torch.manual_seed(args.seed)
    base = read_tuning(args.base)[1]["constants"] if args.base else {}
    rng, held_out = np.random.default_rng(args.seed), val_tasks(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    alone = [window_rewards(BalanceFeedback(**base), task) for task in held_out]
    print(f"planner alone on val: {mean_of(alone):.4f}")
    network = _network(args.hidden)
    forecast = fit_weights(tuple(traces_of(args)), args.window, args.seed, args.model, args.system)
    card = {
        "training": {"by": "imitation", **{k: v for k, v in asdict(args).items() if k != "out"}},
        "trace_sha256": list(dict.fromkeys(task.trace.sha256 for task in held_out)),
        "commit": git_commit(),
        "versions": dict(package_versions("torch")),
    }
    features, labels, best = [], [], -np.inf
    agent, out = None, Path(args.out)
    for number in range(1, args.n_rounds + 1):
        lesson = OracleLesson(agent, base, forecast)
        _give(lesson, args, int(rng.integers(2**31)))
        features += lesson.features
        labels += lesson.labels
        loss = _fit(network, np.concatenate(features), np.concatenate(labels), args, rng)
        agent = Agent(
            features=FEATURES, layers=layers_of(network), base=base, forecast=forecast, card=card
        )
        last = save_agent(agent, out / "last")
        rewards = [window_rewards(LayerAgent(str(last)), task) for task in held_out]
        scores = scores_of(rewards, alone)
        print(f"round {number}: loss {loss:.4f}, val {scores['reward']:.4f}", flush=True)
        if scores["reward"] > best:
            best = scores["reward"]
            note = "the best round was chosen on val, so the score is optimistic"
            scored = replace(agent, card={**card, "scores": {**scores, "note": note}})
            save_agent(scored, out / "best")
    print(f"best on val {best:.4f}, planner alone {mean_of(alone):.4f}: {out / 'best'}")
    return out / "best.safetensors"


def _give(lesson: OracleLesson, args: Args, seed: int) -> None:
    """Run the lesson over train episodes until it has enough windows of every recording."""
    n_episodes = max(1, args.n_windows // args.episode_windows)
    for task in episodes_of(args, "train", n_episodes, seed):
        run_policy(lesson, task, seed=args.seed)


def _network(hidden: int) -> torch.nn.Sequential:
    sizes = (len(FEATURES), hidden, hidden, len(ACTIONS))
    layers: list[torch.nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def _fit(
    network: torch.nn.Sequential,
    features: NDArray[np.float32],
    labels: FloatArray,
    args: Args,
    rng: np.random.Generator,
) -> float:
    """Least squares by Adam; the mean loss of the last pass."""
    inputs, wanted = torch.as_tensor(features), torch.as_tensor(labels, dtype=torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    losses: Sequence[float] = ()
    for _ in range(args.n_epochs):
        losses = []
        for batch in np.split(
            rng.permutation(len(inputs)), range(args.minibatch, len(inputs), args.minibatch)
        ):
            loss = ((network(inputs[batch]) - wanted[batch]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


if __name__ == "__main__":
    options.run(Args, imitate, "Teach layer agents what a clairvoyant planner does.")
