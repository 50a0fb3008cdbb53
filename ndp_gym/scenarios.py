"""Policies over drawn conditions: episodes that every policy faces alike, and what they earn.

`condition_tasks` draws the episodes once, so that scores of two policies are paired by episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndp_gym.budget import HbmBudget
from ndp_gym.condition import Condition
from ndp_gym.conditions import Conditions, find_conditions
from ndp_gym.inputs import (
    ModelLike,
    SystemLike,
    TraceLike,
    check_integer,
    find_model,
    find_system,
    open_trace,
)
from ndp_gym.policy import InfeasibleError, MissingProfileError, Policy
from ndp_gym.quality import QualityModel
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.reward import reward
from ndp_gym.rollout import Replayed, Task, run_policy, train_profile
from ndp_gym.schedule import Scheduling

__all__ = ["Scores", "condition_tasks", "run_episodes"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a policy earned in each of M episodes, [M] each; nan where it had no plan.

    Attributes:
        reward: mean over the episode's windows of throughput + weight * quality.
        throughput: mean of log(T_ref / T).
        quality: mean of -(D - D_ref), nats.
        tokens: decoded.
        decode_s, ref_decode_s: seconds of all windows, and those of the reference.
        delta_nll, ref_delta_nll: nats per token.
        n_repaired: experts that the budget moved to the far tier.
        decision_s: mean seconds of a call of the policy.
    """

    reward: FloatArray
    throughput: FloatArray
    quality: FloatArray
    tokens: FloatArray
    decode_s: FloatArray
    ref_decode_s: FloatArray
    delta_nll: FloatArray
    ref_delta_nll: FloatArray
    n_repaired: FloatArray
    decision_s: FloatArray

    @property
    def tokens_per_s(self) -> FloatArray:
        """Decode throughput of each episode."""
        return self.tokens / self.decode_s

    @property
    def speedup(self) -> FloatArray:
        """Throughput over that of all experts far at 4 bit."""
        return self.ref_decode_s / self.decode_s


def condition_tasks(
    trace: TraceLike = None,
    model: ModelLike = None,
    system: SystemLike = None,
    conditions: str | Conditions | None = "rand",
    split: str = "val",
    n_episodes: int = 32,
    max_windows: int | None = 64,
    seed: int = 0,
    *,
    window: int = 16,
    batch_size: int = 8,
    hbm_budget: HbmBudget = 0.10,
    scheduling: Scheduling = "continuous",
    quality_weight: str | float = "balanced",
    quality: QualityModel | None = None,
) -> list[Task]:
    """Episodes over the requests of ``split``, each in its own order and under its own condition.

    Episode ``i`` depends on ``seed`` and ``i`` alone. Arguments that the conditions draw say
    nothing here; the others are as for `ndp_gym.evaluate`.

    Raises:
        ValueError: unknown names, recording and model disagree, a number is out of range.
    """
    for name, value in (("n_episodes", n_episodes), ("window", window), ("batch_size", batch_size)):
        check_integer(name, value, least=1)
    opened = open_trace(trace)
    spec, found = find_conditions(conditions), find_system(system)
    weight = weight_of(quality_weight)
    task = Task(
        trace=opened, model=find_model(model, opened), system=found, batch_size=batch_size,
        window=window, hbm_budget=hbm_budget, split=split, scheduling=scheduling,
        quality=quality or QualityModel(), kappa_given=quality is not None, quality_weight=weight,
        max_windows=max_windows, profile=train_profile(opened),
    )  # fmt: skip
    base = Condition(
        system=found, batch_size=batch_size, hbm_budget=hbm_budget, quality_weight=weight
    )
    requests, domain = opened.split_requests(split), opened.requests.domain
    tasks = []
    for episode in range(n_episodes):
        rng = np.random.default_rng([seed, episode])
        order, condition = spec.draw_episode(rng, base, requests, domain)
        tasks.append(task.under(condition, order))
    return tasks


def run_episodes(
    policy: Policy,
    tasks: Sequence[Task],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of ``policy``, which is reset for every task, in each of them.

    Where it says that it has no plan (`InfeasibleError`, `MissingProfileError`) its scores are nan.

    Raises:
        PolicyError: the policy fails, or its plan does not fit model or system.
    """
    columns: dict[str, list[float]] = {name: [] for name in Scores.__dataclass_fields__}
    for done, task in enumerate(tasks):
        found = _score(policy, task, [seed, done])
        for name, values in columns.items():
            values.append(found.get(name, np.nan))
        if progress is not None:
            progress(done + 1, len(tasks))
    return Scores(**{name: np.array(values) for name, values in columns.items()})


def _score(policy: Policy, task: Task, seed: Sequence[int]) -> dict[str, float]:
    """The fields of `Scores` for one episode; empty where the policy has no plan."""
    windows: list[Replayed] = []
    try:
        measured = run_policy(policy, task, seed=seed, watch=windows.append)
    except (InfeasibleError, MissingProfileError):
        return {}
    outcomes = [replayed.outcome for replayed in windows]
    tokens = np.array([float(o.tokens) for o in outcomes])
    terms = {name: np.array(values) for name, values in measured.terms.items()}
    return {
        "reward": float(reward(terms, task.quality_weight).mean()),
        "throughput": float(terms["throughput"].mean()),
        "quality": float(terms["quality"].mean()),
        "tokens": float(tokens.sum()),
        "decode_s": float(measured.totals["decode_s"]),
        "ref_decode_s": float(sum(o.ref_decode_s for o in outcomes)),
        "delta_nll": float(np.average([o.delta_nll for o in outcomes], weights=tokens)),
        "ref_delta_nll": float(np.average([o.ref_delta_nll for o in outcomes], weights=tokens)),
        "n_repaired": float(measured.totals["n_repaired"]),
        "decision_s": float(np.mean(measured.decision_s)),
    }
