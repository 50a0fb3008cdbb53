"""Train layer agents with PPO: ``python -m train.ppo --out runs/ppo`` and watch val.

One network decides for every layer (`ndp_gym.layer_env`), of every recording that is named. The
agent is scored on the val split before the first update and every few thousand windows, beside the
planner that it bends, `balance_feedback` with the constants of ``--base``; the best one is kept.
The output folder gets ``best`` and ``last`` (agents, each a .safetensors and a .json),
``curve.svg`` (val so far), ``checkpoint`` (to resume), ``wandb``. The test split is never opened
here. ``--conf-file`` takes experiments from ``train/experiments``.

    ndp-gym evaluate --split val --policies agent:path=runs/ppo/best,balance
"""

from __future__ import annotations

import pickle
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, Logger
from tqdm import tqdm

from ndp_gym.agent_file import Agent, load_agent, save_agent
from ndp_gym.commands.evaluate import parse_budget
from ndp_gym.layer_env import LayerVecEnv, LayerVecEnvs
from ndp_gym.provenance import env_spec_json, git_commit, package_versions
from ndp_gym.report import check_writable, write_whole
from ndp_gym.rollout import Task
from ndp_gym.rules import check_numbers
from ndp_gym.tracking import Mode, tracked_run
from policies.agent import LayerAgent, find_agent
from policies.balance_feedback import BalanceFeedback
from policies.tuned import read_tuning
from train import options, setting
from train.curves import curve_of_run
from train.forecast import fit_weights
from train.interrupts import is_stopping, noted
from train.networks import agent_of, take_over, windows_of
from train.resume import NOT_IN_CARD, check_same, with_saved
from train.setting import Setting, mean_of, scores_of, traces_of, val_tasks, weight
from train.tracking import Scored, WandbWriter, log_result, placement_figure, scored


@dataclass(frozen=True, kw_only=True)
class Args(Setting):
    """What a run is; every field is an option of the command."""

    out: str = "runs/ppo"
    """folder for agents, checkpoint and wandb files"""
    resume: bool = False
    """go on from the checkpoint in the folder, with the options of its run"""
    base: str | None = None
    """tuning whose constants the planner has that agents bend (default: of --init, else untuned)"""
    init: str | None = None
    """agent to start from, by path or shipped name (default: a new network)"""
    n_windows: int = 16_000
    """decode windows to train on, all copies together; rounded up to whole updates"""
    eval_every: int = 4_096
    """windows between two evaluations and checkpoints"""
    n_lanes: int = 16
    """copies of the environment per recording, each with one agent per layer"""
    own: float = 0.0
    """share of an agent's reward that is its own layer's: the link's time is everybody's"""
    n_steps: int = 32
    """windows per copy and update"""
    minibatch: int = 2048
    """samples per gradient step"""
    n_epochs: int = 5
    """passes over the samples of an update"""
    learning_rate: float = 3e-4
    """falls linearly to a twentieth"""
    gamma: float = 0.5
    """discount per window"""
    gae_lambda: float = 0.9
    """of the advantage estimate"""
    hidden: int = 64
    """width of the two hidden layers"""
    log_std_init: float = -2.0
    """log of the exploration noise at the start"""
    wandb: Mode = "offline"
    """tracking: offline, online or disabled"""
    wandb_project: str = "ndp-gym"
    """wandb project"""


NUMBERS = {
    **setting.NUMBERS,
    "n_windows": "at least 0",
    **dict.fromkeys(("eval_every", "n_lanes", "n_steps", "n_epochs", "hidden"), "at least 1"),
    "minibatch": "at least 2",  # advantages are normalised over it
    **dict.fromkeys(("own", "gamma", "gae_lambda"), "in 0..1"),
    "learning_rate": "finite and > 0",
    "log_std_init": "finite",
}  # fmt: skip
"""What the numbers of `Args` may be."""


class ValScore(BaseCallback):
    """Evaluates on val, keeps the best agent and a checkpoint, and says how far it got."""

    def __init__(
        self, args: Args, base: dict[str, float], tasks: Sequence[Task], card: dict[str, Any]
    ) -> None:
        """Score the planner alone once; ``base`` are its constants."""
        super().__init__()
        self.args, self.base, self.tasks, self.card = args, base, tasks, card
        self.out = Path(args.out)
        self.alone = scored(BalanceFeedback(**self.base), tasks)
        self.alone_score = mean_of(self.alone.rewards)
        self.best: Scored | None = None
        self.curve: list[list[float]] = []
        self.start, self.start_windows, self.start_s = time.monotonic(), 0, 0.0
        # Only where stderr is a terminal.
        self.bar = tqdm(total=args.n_windows, unit="window", disable=None, dynamic_ncols=True)

    @property
    def best_score(self) -> float:
        """Reward of the best agent so far."""
        return -np.inf if self.best is None else mean_of(self.best.rewards)

    @property
    def n_windows(self) -> int:
        """Windows replayed so far, of all copies."""
        return windows_of(self.model, self.model.num_timesteps)

    @property
    def seconds(self) -> float:
        """Seconds of training and scoring so far, those before a checkpoint included."""
        return self.start_s + time.monotonic() - self.start

    @property
    def is_due(self) -> bool:
        """Whether nobody has scored the agent as it is now."""
        return not self.curve or self.n_windows > self.curve[-1][0]

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self.bar.reset()
        self.bar.n = self.bar.initial = self.n_windows  # those before a checkpoint took no time
        if not self.curve:
            self.score()
        self.show_placement()

    def _on_step(self) -> bool:
        self.bar.update(self.n_windows - self.bar.n)
        return not is_stopping()

    def _on_rollout_start(self) -> None:
        if self.n_windows - self.curve[-1][0] >= self.args.eval_every:
            self.score()

    def score(self) -> None:
        """Write the present agent, score it on val, and keep it as the best if it is.

        The card of the best has the whole curve: windows trained on, seconds and reward on val of
        every score so far, those after it included.
        """
        seconds = self.seconds
        save_agent(agent_of(self.model, self.card), self.out / "last")
        found = scored(LayerAgent(str(self.out / "last")), self.tasks)
        scores = scores_of(found.rewards, self.alone.rewards)
        scores["n_windows_trained"] = self.n_windows
        score = scores["reward"]
        self.curve.append([self.n_windows, round(seconds, 1), score])
        if score > self.best_score:
            self.best = found
            note = "chosen as the best of this run on val, so the score is optimistic"
            best = agent_of(self.model, {**self.card, "scores": {**scores, "note": note}})
        else:
            best = load_agent(self.out / "best")
        best = replace(best, card={**best.card, "curve": self.curve})
        save_agent(best, self.out / "best")
        self.checkpoint()
        write_whole(self.out / "curve.svg", curve_of_run(best.card))
        self.logger.record("val/reward", score)
        self.logger.record("val/best", self.best_score)
        self.logger.record("val/gain", scores["gain"])
        self.logger.record("val/alone", self.alone_score)
        self.logger.dump(self.model.num_timesteps)
        planner = "tuned" if self.base else "untuned planner"
        self.bar.set_postfix_str(
            f"val {score:.4f}, best {self.best_score:.4f}, {planner} {self.alone_score:.4f}"
        )
        tqdm.write(
            f"{self.n_windows:7d}/{self.args.n_windows} windows {self.seconds:4.0f} s{self.left()}"
            f"  {said(scores)}, best {self.best_score:.4f}"
        )
        sys.stdout.flush()

    def left(self) -> str:
        """Seconds to go as a part of the progress line; nothing where the pace is unknown."""
        done, to_go = self.n_windows - self.start_windows, self.args.n_windows - self.n_windows
        if not done:
            return ""
        return f", {max(to_go, 0) * (time.monotonic() - self.start) / done:4.0f} s left"

    def show_placement(self) -> None:
        """Log where the best agent and the planner alone put experts; drawing takes a second."""
        if self.best is not None and self.args.wandb != "disabled":
            figure = placement_figure(self.best.placed, self.alone.placed)
            self.logger.record("val/placement", Figure(figure, close=False))
            self.logger.dump(self.model.num_timesteps)

    def checkpoint(self) -> None:
        """Everything needed to go on; the file appears whole or not at all."""
        part = self.out / "checkpoint.part"
        state = {
            "parameters": self.model.get_parameters(),
            "num_timesteps": self.model.num_timesteps,
            "curve": self.curve,
        }
        torch.save(state, part)
        part.replace(self.out / "checkpoint")

    def resume(self, model: PPO) -> None:
        """Take up the checkpoint; tensors and numbers only, nothing is unpickled.

        Raises:
            ValueError: it is damaged, or is that of another network.
        """
        try:
            state = torch.load(self.out / "checkpoint", weights_only=True)
            model.set_parameters(state["parameters"])
            model.num_timesteps, self.curve = state["num_timesteps"], state["curve"]
        except (
            ValueError, RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError,
        ) as error:  # fmt: skip
            first = str(error).partition("\n")[0]
            raise ValueError(f"{self.out / 'checkpoint'}: cannot be resumed: {first}") from error
        self.best = scored(LayerAgent(str(self.out / "best")), self.tasks)
        self.start_windows, self.start_s = windows_of(model, model.num_timesteps), self.curve[-1][1]


def said(scores: Mapping[str, Any]) -> str:
    """Scores of an agent as a part of the progress line."""
    (error,) = (value for name, value in scores.items() if name.startswith("gain_standard_error"))
    gain = f"gain {scores['gain']:+.4f} +- {error:.4f} over the planner"
    return f"val {scores['reward']:.4f}, {gain}"


def start_of(args: Args) -> Agent | None:
    """Whose planner and forecast a run has: the best so far if resumed, else those of ``--init``.

    Raises:
        ValueError: it is no agent.
        OSError: it cannot be read.
    """
    if args.resume:
        return load_agent(Path(args.out) / "best")
    return find_agent(args.init) if args.init else None


def base_of(args: Args, start: Agent | None) -> dict[str, float]:
    """Constants of the planner that the agents bend; none where it is untuned.

    Raises:
        ValueError: the agent to start from bends a planner with others.
        OSError: a file cannot be read.
    """
    if start is not None and (args.resume or not args.base):
        return dict(start.base)
    tuned = read_tuning(args.base)[1]["constants"] if args.base else {}
    if start is None:
        return tuned
    names = sorted({**tuned, **start.base})
    differ = [name for name in names if tuned.get(name) != start.base.get(name)]
    if differ:
        raise ValueError(
            f"base must have the constants of the agent that training starts from, or be left out; "
            f"{args.base} has other {', '.join(differ)}"
        )
    return dict(start.base)


def forecast_of(args: Args, start: Agent | None) -> NDArray[np.float64] | None:
    """Weights of the agents' forecast: those of the agent to start from, else fitted."""
    if start is not None and start.forecast is not None:
        return start.forecast
    return fit_weights(tuple(traces_of(args)), args.window, args.seed, args.model, args.system)


def environment_arguments(args: Args, path: str | None) -> dict[str, Any]:
    """What `NDPPlacementEnv` takes for the recording at ``path``, as JSON values."""
    return {
        "trace": path, "model": args.model, "system": args.system, "batch_size": args.batch_size,
        "window": args.window, "hbm_budget": parse_budget(args.hbm_budget),
        "quality_weight": weight(args.quality_weight), "conditions": args.conditions,
        "max_windows": 10**6 if args.conditions == "fix" else args.episode_windows,
    }  # fmt: skip


def environment(
    args: Args, base: dict[str, float], forecast: NDArray[np.float64] | None
) -> LayerVecEnvs:
    """One group of copies per recording; planner and forecast of the agents as given."""
    return LayerVecEnvs([
        LayerVecEnv(
            args.n_lanes, own=args.own, base=base, forecast=forecast,
            **environment_arguments(args, path),
        )
        for path in traces_of(args)
    ])  # fmt: skip


def check(args: Args) -> None:
    """Refuse what cannot be trained before anything is written.

    Raises:
        ValueError: a number is out of range, there is nothing to resume, that is another
            experiment, or training would overwrite an agent.
        OSError: the folder cannot be written, or a file not be read.
    """
    check_numbers(args, NUMBERS)
    out = Path(args.out)
    check_writable(out / "best.json")
    if args.resume:
        check_same(args)
    elif any((out / f"best{suffix}").exists() for suffix in (".json", ".safetensors")):
        raise ValueError(f"{out} has an agent already: --resume goes on, another --out keeps it")


def new_model(args: Args, env: LayerVecEnvs) -> PPO:
    """PPO before its first update; the last mini-batch of an update may be a smaller one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have specified a mini-batch size", UserWarning)
        return PPO(
            "MlpPolicy", env, seed=args.seed, n_steps=args.n_steps, batch_size=args.minibatch,
            n_epochs=args.n_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda,
            learning_rate=lambda left: args.learning_rate * (0.05 + 0.95 * left),
            policy_kwargs={"net_arch": [args.hidden] * 2, "log_std_init": args.log_std_init},
            device="cpu",
        )  # fmt: skip


def train(args: Args) -> Path:
    """Train and return the path of the best agent's weights.

    Raises:
        ValueError: an option is out of range, does not fit the others, or names what is no agent,
            tuning or recording.
        OSError: a file cannot be read or written.
    """
    torch.set_num_threads(1)
    check(args)
    start = start_of(args)
    base, tasks = base_of(args, start), val_tasks(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    env = environment(args, base, forecast_of(args, start))
    model = new_model(args, env)
    card = {
        "training": {k: v for k, v in asdict(args).items() if k not in NOT_IN_CARD},
        "trace_sha256": [group.lanes.trace.sha256 for group in env.groups],
        "commit": git_commit(),
        "versions": dict(package_versions("torch", "stable-baselines3")),
    }
    if start is not None and not args.resume:
        take_over(model, start)
    scoring = ValScore(args, base, tasks, card)
    with scoring.bar:
        if args.resume:
            scoring.resume(model)
            env.seed(args.seed + model.num_timesteps)  # other orders of requests than at the start
        if args.resume and (done := scoring.start_windows) >= args.n_windows:
            tqdm.write(f"{done} windows are done, nothing is left: a larger --n-windows goes on")
        else:
            learn(args, model, scoring)
    print(
        f"best on val {scoring.best_score:.4f}, before training {scoring.curve[0][2]:.4f}, "
        f"planner alone {scoring.alone_score:.4f}: {scoring.out / 'best'}"
    )
    return scoring.out / "best.safetensors"


def learn(args: Args, model: PPO, scoring: ValScore) -> None:
    """Train and score to the end or to Ctrl-C, and tell wandb."""
    env: Any = model.get_env()
    specs = [env_spec_json(environment_arguments(args, path)) for path in traces_of(args)]
    with tracked_run(
        {**scoring.card, "env_specs": specs}, output_dir=scoring.out, mode=args.wandb,
        project=args.wandb_project, job_type="train",
        name=f"layer_agents__ppo__{args.seed}__{int(time.time())}",
    ) as run, noted():  # fmt: skip
        model.set_logger(Logger(None, [WandbWriter(run)]))
        steps = args.n_windows * env.num_envs // env.windows_per_step - model.num_timesteps
        model.learn(max(steps, 0), callback=scoring, reset_num_timesteps=False)
        scoring.model = model
        if is_stopping():
            tqdm.write(f"stopped after {scoring.n_windows} windows; go on with --resume")
        if scoring.is_due:
            scoring.score()
        run.summary.update({"val/best": scoring.best_score, "val/alone": scoring.alone_score})
        if args.wandb != "disabled" and scoring.best is not None:
            scoring.show_placement()
            log_result(
                run, model.num_timesteps, scoring.out / "best.safetensors", scoring.tasks,
                scoring.best, scoring.alone, is_tuned=bool(scoring.base),
            )  # fmt: skip


if __name__ == "__main__":
    options.run(Args, train, "Train layer agents with PPO.", partial(with_saved, Args))
