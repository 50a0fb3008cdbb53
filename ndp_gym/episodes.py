"""`Episodes`: N episodes of the environment that step together, under the names users see.

What the single env (N = 1) and the vector env share: arguments, spaces, rewards and infos. It
knows Gymnasium's spaces, but neither its reset protocols nor rendering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.bounds import observation_space
from ndp_gym.budget import HbmBudget
from ndp_gym.conditions import Conditions, find_conditions
from ndp_gym.encoding import encoding_of
from ndp_gym.inputs import (
    ModelLike,
    QualityLike,
    SystemLike,
    TraceLike,
    find_model,
    find_quality,
    find_system,
    open_trace,
)
from ndp_gym.lanes import Lanes, Observations
from ndp_gym.outcome import Outcome
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.reward import reward, reward_terms
from ndp_gym.schedule import Scheduling, check_count

__all__ = ["Episodes", "Stepped"]

Infos = dict[str, NDArray[Any]]
_OUTCOMES = {  # names in info -> fields of `Outcome`
    "tokens": "tokens",
    "decode_s": "decode_s",
    "ref_decode_s": "ref_decode_s",
    "load_s": "load_s",
    "delta_nll_nats": "delta_nll",
    "ref_delta_nll_nats": "ref_delta_nll",
    "energy_j": "energy_j",
    "hbm_weight_bytes": "hbm_weight_bytes",
    "far_weight_bytes": "far_weight_bytes",
    "activation_bytes": "activation_bytes",
    "fetch_bytes": "fetch_bytes",
    "migration_bytes": "migration_bytes",
    "wasted_bytes": "wasted_bytes",
    "load_bytes": "load_bytes",
    "n_repaired": "n_repaired",
}


class Stepped(NamedTuple):
    """One window of N episodes; lanes that idled have reward 0 and meaningless infos."""

    rewards: NDArray[np.float64]
    truncated: NDArray[np.bool_]
    infos: Infos


class Episodes:
    """N lanes with an action encoding, a reward and an end.

    Args:
        n_lanes: episodes N.
        hbm_budget: bytes (int), share of all routed-expert bytes at 16 bit (float in (0, 1]),
            ``"auto"``, or two shares: every episode draws one between them, log-uniformly.
        others: see `ndp_gym.env.NDPPlacementEnv`.

    Raises:
        ValueError: an argument is out of range, or recording, model and system do not agree.
        OSError: the recording cannot be read.
    """

    def __init__(
        self,
        n_lanes: int,
        *,
        trace: TraceLike,
        model: ModelLike,
        system: SystemLike,
        batch_size: int,
        window: int,
        hbm_budget: HbmBudget | Sequence[float],
        split: str,
        scheduling: Scheduling,
        max_windows: int | None,
        action: str,
        quality_weight: str | float,
        quality: QualityLike,
        conditions: str | Conditions | None,
    ) -> None:
        """Open the recording and size everything; every lane then waits for `reset`."""
        if max_windows is not None:
            check_count("max_windows", max_windows)
        opened = open_trace(trace)
        found_model, found_system = find_model(model, opened), find_system(system)
        drawn_from, shares = find_conditions(conditions), _share_range(hbm_budget)
        if shares and drawn_from.hbm_budget is None:
            drawn_from = replace(drawn_from, hbm_budget=shares)
        self.lanes = Lanes(
            opened,
            found_model,
            found_system,
            n_lanes=n_lanes,
            batch_size=batch_size,
            window=window,
            hbm_budget=shares[1] if shares else hbm_budget,  # type: ignore[arg-type]
            scheduling=scheduling,
            quality=find_quality(quality, found_model, found_system),
            quality_weight=weight_of(quality_weight),
            conditions=drawn_from,
        )
        if max_windows is None:  # what the whole recording takes, one request after the other
            max_windows = int((-(-opened.requests.n_decode // window)).sum())
        self.max_windows = max_windows
        self.encoding = encoding_of(action, self.lanes)
        self.observation_space = observation_space(
            self.lanes, max_windows, moves=self.encoding.sets_service
        )
        self._requests = opened.split_requests(split)

    def reset(
        self, lane: int, rng: np.random.Generator, options: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Start an episode on one lane -> info.

        Without ``options["requests"]`` the split's requests are permuted by ``rng``.

        Raises:
            ValueError: options are unknown or name requests that cannot run.
        """
        lanes = self.lanes
        given, drawn_from = self._given_requests(options), lanes.drawn_from
        if given is None:
            domain = lanes.trace.requests.domain
            order, condition = drawn_from.draw_episode(rng, lanes.base, self._requests, domain)
        else:
            order, condition = given, drawn_from.draw(rng, lanes.base)
        lanes.reset(lane, order, condition)
        self.encoding.reset(lane, lanes)
        return {
            "n_requests": len(order),
            "hbm_budget_bytes": int(lanes.budgets()[lane]),
            "gates": lanes.gates,
            "condition": condition.told(),
            "hidden": condition.hidden(),
        }

    @property
    def n_windows(self) -> NDArray[np.int64]:
        """[N] windows of each episode so far."""
        return self.lanes.n_windows

    def observe(self) -> Observations:
        """What policies see now, each array flattened to [N, n]; fresh arrays."""
        n_lanes = self.lanes.n_lanes
        return {name: a.reshape(n_lanes, -1) for name, a in self.lanes.observe().items()}

    def step(self, actions: NDArray[Any], idle: NDArray[np.bool_] | None = None) -> Stepped:
        """One window on every lane; those in ``idle`` decode nothing and wait for `reset`."""
        lanes = self.lanes
        if idle is not None:
            for lane in np.flatnonzero(idle):
                lanes.clear(int(lane))
        admissions = _admissions(lanes)
        outcome = lanes.advance(*self.encoding.decode(actions, lanes))
        if idle is None:
            terms = reward_terms(outcome)
            rewards = reward(terms, lanes.quality_weights)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = reward_terms(outcome)
                rewards = np.where(idle, 0.0, reward(terms, lanes.quality_weights))
        infos = _infos(outcome, terms, admissions)
        return Stepped(rewards, lanes.is_done | (self.n_windows >= self.max_windows), infos)

    def _given_requests(self, options: Mapping[str, Any] | None) -> NDArray[np.int64] | None:
        if not options:
            return None
        unknown = sorted(set(options) - {"requests"})
        if unknown:
            raise ValueError(f"options must be {{'requests': [...]}}, got {unknown}")
        given = np.asarray(options["requests"])
        n_decode = self.lanes.trace.requests.n_decode
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise ValueError(
                "options['requests'] must be a non-empty list of indices into the request table, "
                f"got {options['requests']!r}"
            )
        if given.min() < 0 or given.max() >= len(n_decode):
            raise ValueError(
                f"options['requests'] must be in 0..{len(n_decode) - 1}, "
                f"got {given.min()}..{given.max()}"
            )
        if (n_decode[given] == 0).any():
            empty = given[n_decode[given] == 0][0]
            raise ValueError(f"options['requests'] must have decode rows, request {empty} has none")
        return given.astype(np.int64)


def _admissions(lanes: Lanes) -> Infos:
    """Requests admitted since the last window and their prefills, before the first load."""
    if not lanes.has_admitted:
        slots = lanes.admitted.shape
        return {
            "admitted": np.zeros(slots, np.bool_),
            "prefill_s": np.zeros(slots[0]),
            "ttft_s": np.zeros(slots),
        }
    waited_s = lanes.waited_s.copy()
    return {
        "admitted": lanes.admitted.copy(),
        "prefill_s": waited_s.max(axis=1),
        "ttft_s": waited_s,
    }


def _infos(outcome: Outcome, terms: dict[str, NDArray[np.float64]], admissions: Infos) -> Infos:
    """Everything info says about the window, one row per lane."""
    infos = admissions
    vector = np.empty((len(outcome.tokens), len(terms)))
    for column, (name, term) in enumerate(terms.items()):
        vector[:, column] = term
        infos[f"reward_{name}"] = term
    infos["reward_vector"] = vector
    for name, field in _OUTCOMES.items():
        infos[name] = getattr(outcome, field)
    infos["hit_rate"] = outcome.hits / np.maximum(outcome.routed, 1)
    infos["ttft_s"] += outcome.load_s[:, None] * infos["admitted"]
    return infos


def _share_range(hbm_budget: HbmBudget | Sequence[float]) -> tuple[float, float] | None:
    """The two shares between which episodes draw theirs, ``None`` for a single budget."""
    if not isinstance(hbm_budget, list | tuple | np.ndarray):
        return None
    try:
        shares = [float(share) for share in hbm_budget]
    except (TypeError, ValueError):
        shares = []
    if len(shares) != 2 or not (0 < shares[0] <= shares[1] <= 1 and math.isfinite(shares[0])):
        raise ValueError(
            f"hbm_budget as a list must be two shares 0 < low <= high <= 1, got {hbm_budget}"
        )
    return shares[0], shares[1]
