"""Train layer agents with PPO: ``python -m train.ppo --out runs/ppo`` and watch val.

One network decides for every layer (`ndp_gym.layer_env`). The agent is scored on the val split
every few thousand windows beside `balance`; the best one is kept. The output folder gets ``best``
and ``last`` (agents, each a .safetensors and a .json), ``checkpoint`` (to resume), ``wandb``. The
test split is never opened here.

    ndp-gym evaluate --split val --policies agent:path=runs/ppo/best,balance
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from ndp_gym.agent_file import Agent, save_agent
from ndp_gym.commands.evaluate import parse_budget
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.layer_env import LayerVecEnv
from ndp_gym.policy import Policy
from ndp_gym.provenance import git_commit, package_versions
from ndp_gym.quality import QualityModel
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.rollout import Task, run_policy, train_profile
from ndp_gym.tracking import Mode, tracked_run
from policies.agent import LayerAgent
from policies.balance import Balance


@dataclass(frozen=True, kw_only=True)
class Args:
    """What a run is; every field is an option of the command."""

    out: str = "runs/ppo"
    """folder for agents, checkpoint and wandb files"""
    resume: bool = False
    """go on from the checkpoint in the folder"""
    seed: int = 0
    """of network, exploration and order of requests"""
    n_windows: int = 60_000
    """decode windows to train on, all copies together"""
    eval_every: int = 4_096
    """windows between two evaluations and checkpoints"""
    trace: str | None = None
    """recording (default: the bundled one)"""
    model: str | None = None
    """model preset (default: the one the recording names)"""
    system: str | None = None
    """system preset"""
    batch_size: int = 8
    """requests decoded at once"""
    window: int = 16
    """decode steps per plan"""
    hbm_budget: str = "0.10"
    """share of 16-bit experts, bytes (8GB) or auto"""
    quality_weight: str = "balanced"
    """speed, balanced, quality, or reward per nat"""
    n_lanes: int = 16
    """copies of the environment, each with one agent per layer"""
    own: float = 1.0
    """share of an agent's reward that is its own layer's"""
    n_steps: int = 32
    """windows per copy and update"""
    minibatch: int = 512
    """samples per gradient step"""
    n_epochs: int = 5
    """passes over the samples of an update"""
    learning_rate: float = 1e-3
    """falls linearly to a twentieth"""
    gamma: float = 0.5
    """discount per window"""
    gae_lambda: float = 0.9
    """of the advantage estimate"""
    hidden: int = 64
    """width of the two hidden layers"""
    log_std_init: float = -1.0
    """log of the exploration noise at the start"""
    wandb: Mode = "offline"
    """tracking: offline, online or disabled"""
    wandb_project: str = "ndp-gym"
    """wandb project"""


NOT_IN_CARD = ("out", "resume", "wandb", "wandb_project")  # they change nothing about the agent


class WandbWriter(KVWriter):
    """Hands SB3's metrics to a wandb run."""

    def __init__(self, run: Any) -> None:
        """For a run that is open."""
        self.run = run

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Log numbers over the steps that SB3 counts (one per agent and window)."""
        numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float)}
        self.run.log({**numbers, "global_step": step})

    def close(self) -> None:
        """The run is closed by who opened it."""


class ValScore(BaseCallback):
    """Evaluates on val, keeps the best agent and a checkpoint, and says how far it got."""

    def __init__(self, args: Args, task: Task, agents: int, card: dict[str, Any]) -> None:
        """Score `balance` once; ``agents`` is the number of layers."""
        super().__init__()
        self.args, self.task, self.agents, self.card = args, task, agents, card
        self.out = Path(args.out)
        self.balance = window_rewards(Balance(), task)
        self.best, self.scored_at, self.started_at = -np.inf, 0, 0
        self.start = time.monotonic()

    @property
    def n_windows(self) -> int:
        """Windows replayed so far, of all copies."""
        return self.model.num_timesteps // self.agents

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.n_windows - self.scored_at >= self.args.eval_every:
            self.score()

    def score(self) -> None:
        """Write the present agent, score it on val, and keep it as the best if it is."""
        self.scored_at = self.n_windows
        save_agent(agent_of(self.model, self.card), self.out / "last")
        rewards = window_rewards(LayerAgent(str(self.out / "last")), self.task)
        score, gain = float(rewards.mean()), rewards - self.balance
        error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
        if score > self.best:
            self.best = score
            scores = {
                "split": "val",
                "reward": score,
                "reward_balance": float(self.balance.mean()),
                "gain": float(gain.mean()),
                "gain_standard_error_over_windows": error,
                "share_of_windows_won": float((gain > 0).mean()),
                "n_windows_trained": self.n_windows,
                "note": "chosen as the best of this run on val, so the score is optimistic",
            }
            save_agent(agent_of(self.model, {**self.card, "scores": scores}), self.out / "best")
        self.checkpoint()
        self.logger.record("val/reward", score)
        self.logger.record("val/best", self.best)
        self.logger.record("val/gain_over_balance", float(gain.mean()))
        done = self.n_windows - self.started_at
        seconds = time.monotonic() - self.start
        left = max(self.args.n_windows - self.n_windows, 0) * seconds / max(done, 1)
        print(
            f"{self.n_windows:7d}/{self.args.n_windows} windows  {seconds:4.0f} s, {left:4.0f} s "
            f"left  val {score:.4f} (best {self.best:.4f}, balance {self.balance.mean():.4f})",
            flush=True,
        )

    def checkpoint(self) -> None:
        """Everything needed to go on; the file appears whole or not at all."""
        part = self.out / "checkpoint.part"
        state = {
            "parameters": self.model.get_parameters(),
            "num_timesteps": self.model.num_timesteps,
            "best": self.best,
        }
        torch.save(state, part)
        part.replace(self.out / "checkpoint")

    def resume(self, model: PPO) -> None:
        """Take up the checkpoint; tensors and numbers only, nothing is unpickled."""
        state = torch.load(self.out / "checkpoint", weights_only=True)
        model.set_parameters(state["parameters"])
        model.num_timesteps = state["num_timesteps"]
        self.best = state["best"]
        self.started_at = self.scored_at = model.num_timesteps // self.agents


def window_rewards(policy: Policy, task: Task) -> NDArray[np.float64]:
    """Reward of every window of the task's split, in file order: windows pair between policies."""
    terms = run_policy(policy, task, seed=0).terms
    return np.array(terms["throughput"]) + task.quality_weight * np.array(terms["quality"])


def agent_of(model: BaseAlgorithm, card: dict[str, Any]) -> Agent:
    """The policy network of ``model`` without its critic and its noise."""
    policy: Any = model.policy
    linear = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    layers = [
        (m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy())
        for m in [*linear, policy.action_net]
    ]
    env: Any = model.get_env()
    return Agent(features=env.get_attr("agents", 0)[0].features, layers=layers, card=card)


def train(args: Args) -> Path:
    """Train and return the path of the best agent's weights."""
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    env = LayerVecEnv(
        args.n_lanes, trace=args.trace, model=args.model, system=args.system,
        batch_size=args.batch_size, window=args.window, hbm_budget=parse_budget(args.hbm_budget),
        quality_weight=weight(args.quality_weight), own=args.own, max_windows=10**6,
    )  # fmt: skip
    model = PPO(
        "MlpPolicy", env, seed=args.seed, n_steps=args.n_steps, batch_size=args.minibatch,
        n_epochs=args.n_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda,
        learning_rate=lambda left: args.learning_rate * (0.05 + 0.95 * left),
        policy_kwargs={"net_arch": [args.hidden] * 2, "log_std_init": args.log_std_init},
        device="cpu",
    )  # fmt: skip
    card = {
        "training": {k: v for k, v in asdict(args).items() if k not in NOT_IN_CARD},
        "trace_sha256": env.lanes.trace.sha256,
        "commit": git_commit(),
        "versions": dict(package_versions()),
    }
    scoring = ValScore(args, val_task(args), env.num_envs // args.n_lanes, card)
    if args.resume:
        scoring.resume(model)
        env.seed(args.seed + model.num_timesteps)  # other orders of requests than at the start
    with tracked_run(
        card, output_dir=out, mode=args.wandb, project=args.wandb_project, job_type="train",
        name=f"layer_agents__ppo__{args.seed}__{int(time.time())}",
    ) as run:  # fmt: skip
        model.set_logger(Logger(None, [WandbWriter(run)]))
        steps = args.n_windows * scoring.agents - model.num_timesteps
        try:
            model.learn(max(steps, 0), callback=scoring, reset_num_timesteps=False)
        except KeyboardInterrupt:
            print(f"stopped after {scoring.n_windows} windows; go on with --resume")
        scoring.model = model
        scoring.score()
        run.summary.update({"val/best": scoring.best, "val/balance": scoring.balance.mean()})
    print(f"best on val {scoring.best:.4f}, balance {scoring.balance.mean():.4f}: {out / 'best'}")
    return out / "best.safetensors"


def val_task(args: Args) -> Task:
    """The val split under the conditions of training, as ``ndp-gym evaluate`` runs it."""
    trace = open_trace(args.trace)
    return Task(
        trace=trace, model=find_model(args.model, trace), system=find_system(args.system),
        batch_size=args.batch_size, window=args.window, hbm_budget=parse_budget(args.hbm_budget),
        split="val", scheduling="continuous", quality=QualityModel(),
        quality_weight=weight(args.quality_weight), max_windows=None, profile=train_profile(trace),
    )  # fmt: skip


def weight(text: str) -> float:
    """The quality weight behind a name or a number."""
    try:
        return weight_of(float(text))
    except ValueError:
        return weight_of(text)


def parse(argv: Sequence[str] | None = None) -> Args:
    """The options of the command line; help texts are the docstrings of the fields."""
    parser = argparse.ArgumentParser(description="Train layer agents with PPO.")
    hints = get_type_hints(Args)
    for field in fields(Args):
        assert field.default is not MISSING
        name, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if kind is bool:
            parser.add_argument(name, action="store_true")
        elif kind in (int, float, str):
            parser.add_argument(name, type=kind, default=field.default, metavar="X")
        else:
            choices = get_args(kind) if field.name == "wandb" else None
            parser.add_argument(name, default=field.default, choices=choices)
    return Args(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    train(parse())
