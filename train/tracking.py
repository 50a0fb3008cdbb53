"""What a training run tells wandb: curves, where the best agent puts experts, a final table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.logger import Figure as Drawn
from stable_baselines3.common.logger import KVWriter

from ndp_gym.agent_file import load_agent
from ndp_gym.charts import panels
from ndp_gym.policy import Policy
from ndp_gym.rollout import Measurement, Replayed, Task, run_policy
from ndp_gym.tracking import log_agent, log_trace
from policies.balance import Balance
from policies.balance_feedback import BalanceFeedback
from train.setting import rewards_of, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from wandb import Run, Table

FloatArray = NDArray[np.float64]


class Placed(NamedTuple):
    """Where experts were in an episode.

    Attributes:
        hbm_share: [L, E] share of the windows for which the plan wants the expert in HBM, repair
            included.
        mean_bits: [L, E] mean over windows of the width that the plan gives it, in HBM or far.
        n_windows: of the episode.
    """

    hbm_share: FloatArray
    mean_bits: FloatArray
    n_windows: int


class Scored(NamedTuple):
    """What a policy reached on the episodes that scores are made on.

    Attributes:
        rewards: [W] per episode.
        runs: sums per episode.
        placed: where it put experts in the first one.
    """

    rewards: list[FloatArray]
    runs: list[Measurement]
    placed: Placed


def scored(policy: Policy, tasks: Sequence[Task]) -> Scored:
    """Run ``policy`` over all episodes and watch its plans in the first."""
    seen = _Seen()
    runs = [run_policy(policy, task, seed=0, watch=None if i else seen.add)
            for i, task in enumerate(tasks)]  # fmt: skip
    rewards = [rewards_of(run, task) for run, task in zip(runs, tasks, strict=True)]
    n = seen.n_windows
    return Scored(rewards, runs, Placed(seen.in_hbm / n, seen.bits / n, n))


class _Seen:
    """Sums over windows, since an episode may be long."""

    in_hbm: Any = 0
    bits: Any = 0
    n_windows = 0

    def add(self, window: Replayed) -> None:
        self.in_hbm = self.in_hbm + (window.wanted > 0)
        self.bits = self.bits + window.plan.placement.bitwidth.astype(float)
        self.n_windows += 1


class WandbWriter(KVWriter):
    """Hands SB3's metrics to a wandb run."""

    def __init__(self, run: Any) -> None:
        """For a run that is open."""
        self.run = run

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Log numbers and figures over the steps that SB3 counts (one per agent and window)."""
        logged: dict[str, Any] = {"global_step": step}
        for key, value in key_values.items():
            if isinstance(value, int | float):
                logged[key] = float(value)
            elif isinstance(value, Drawn):
                logged[key] = _image(value.figure)
        self.run.log(logged)

    def close(self) -> None:
        """The run is closed by who opened it."""


def _image(figure: Any) -> Any:
    """The figure's pixels; wandb's own way would load pyplot."""
    import wandb

    figure.canvas.draw()
    return wandb.Image(np.asarray(figure.canvas.buffer_rgba()))


def placement_figure(agent: Placed, alone: Placed) -> Figure:
    """Heat maps of layers by experts: share of windows in HBM and mean bits, agent and planner.

    The experts of every layer are sorted, the same way in all maps, by how often the planner alone
    has them in HBM. The third map of a row is the agent less the planner, blue where the agent
    gives more.
    """
    order = np.argsort(-alone.hbm_share, axis=1, kind="stable")
    n_layers, n_experts = order.shape
    size = (3 * (2.2 + min(n_experts, 256) / 128), 2 * (2.0 + min(n_layers, 64) / 32))
    figure, axes = panels(size, 3, 2)
    bits = np.stack([agent.mean_bits, alone.mean_bits])
    for name, row, values, (low, high) in (
        ("share of windows in HBM", axes[:3], (agent.hbm_share, alone.hbm_share), (0.0, 1.0)),
        ("mean bits", axes[3:], bits, (bits.min(), max(bits.max(), bits.min() + 1))),
    ):
        one, other = (np.take_along_axis(v, order, axis=1) for v in values)
        apart = max(float(np.abs(one - other).max()), 0.01)
        _map(row[0], one, "agent", "viridis", (low, high))
        shown = _map(row[1], other, "planner alone", "viridis", (low, high))
        figure.colorbar(shown, ax=row[1]).ax.tick_params(labelsize=7)
        shown = _map(row[2], one - other, "agent less planner", "RdBu", (-apart, apart))
        figure.colorbar(shown, ax=row[2]).ax.tick_params(labelsize=7)
        row[0].set_ylabel(f"{name}\nlayer", fontsize=8)
    figure.supxlabel("experts of the layer, first those that the planner has in HBM most often",
                     fontsize=8)  # fmt: skip
    figure.suptitle(f"where experts are in the first val episode ({alone.n_windows} windows)",
                    fontsize=9)  # fmt: skip
    return figure


def _map(
    axes: Axes, values: FloatArray, title: str, colours: str, limits: tuple[float, float]
) -> AxesImage:
    axes.set_title(title, fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    low, high = limits
    return axes.imshow(
        values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )


def log_result(
    run: Run,
    step: int,
    weights: Path,
    tasks: Sequence[Task],
    best: Scored,
    alone: Scored,
    *,
    is_tuned: bool,
) -> None:
    """Log the best agent and its recordings as artifacts, and a table of it beside heuristics.

    Args:
        run: of wandb.
        step: steps of agents so far.
        weights: of the best agent, its card beside them.
        tasks: what was scored.
        best: what the best agent reached there.
        alone: what the planner that agents bend reached there.
        is_tuned: whether that planner has other constants than `balance_feedback`.
    """
    log_agent(run, weights, load_agent(weights).card["scores"])
    for trace in {task.trace.sha256: task.trace for task in tasks}.values():
        log_trace(run, trace)
    found = {
        "agent": best,
        "planner alone": alone,
        "balance": scored(Balance(), tasks),
        "balance_feedback": scored(BalanceFeedback(), tasks) if is_tuned else alone,
    }
    run.log({"val/policies": comparison(found, "planner alone"), "global_step": step})


def comparison(found: Mapping[str, Scored], yardstick: str) -> Table:
    """A row per policy: what it reached on val, and its gain over the policy ``yardstick``.

    Tokens per second and ΔNLL are those of all episodes together; the speed-up is the geometric
    mean over windows, episodes alike, over all experts far at 4 bit.
    """
    import wandb

    said_once = ("split", "reward_alone")
    rows = []
    for name, one in found.items():
        scores = scores_of(one.rewards, found[yardstick].rewards)
        kept = {key: value for key, value in scores.items() if key not in said_once}
        rows.append({"policy": name, **kept, **_speed(one.runs)})
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def _speed(runs: Sequence[Measurement]) -> dict[str, float]:
    tokens, seconds = (sum(run.totals[name] for run in runs) for name in ("tokens", "decode_s"))
    return {
        "tokens_per_s": float(tokens / seconds),
        "speedup": float(np.exp(np.mean([np.mean(run.terms["throughput"]) for run in runs]))),
        "delta_nll_nats": float(sum(run.loss.sum() for run in runs) / tokens),
    }
