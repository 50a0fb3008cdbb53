"""Layer agents as a `VecEnv` of Stable-Baselines3: N copies of the environment, L agents in each.

Agent ``lane * L + layer`` sees and decides for one layer of one copy (`ndp_gym.layer_agents`); SB3
trains one policy for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnv,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

from ndp_gym.budget import HbmBudget
from ndp_gym.conditions import Conditions, find_conditions
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
from ndp_gym.lanes import Lanes
from ndp_gym.layer_agents import ACTIONS, LayerAgents, layer_rewards
from ndp_gym.layer_forecast import learned_of
from ndp_gym.patterns import train_patterns
from ndp_gym.reward import quality_weight as weight_of
from ndp_gym.reward import reward, reward_terms
from ndp_gym.rollout import train_profile
from ndp_gym.schedule import Scheduling

__all__ = ["LayerVecEnv", "LayerVecEnvs"]

REWARD_SCALE = 3.0
"""Rewards are multiplied by it, as in the study, so that values are of order 1."""


class _Agents(VecEnv):
    """What every `VecEnv` of layer agents shares: spaces, and what SB3 may ask of one."""

    def __init__(self, num_envs: int, n_features: int) -> None:
        self._actions: NDArray[Any] = np.empty(0)
        super().__init__(
            num_envs,
            spaces.Box(-5.0, 5.0, (n_features,), np.float32),
            spaces.Box(-1.0, 1.0, (len(ACTIONS),), np.float32),
        )

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions, [agents, 4], for `step_wait`."""
        self._actions = actions

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of this object, once per agent."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of this object, whatever the indices."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Agents are no environments of their own.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"layer agents have no method {method_name!r}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Only Monitor's episode statistics are kept."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]


class LayerVecEnv(_Agents):
    """``n_lanes * n_layers`` agents; arguments as for `NDPPlacementEnv`.

    Args:
        n_lanes: copies of the environment.
        own: share of an agent's reward that is its own layer's (`layer_rewards`); the rest is the
            environment's, the same for all layers of a copy.
        base: constants of the planner that agents bend, see `LayerAgents`.
        forecast: weights [5, 6] of their forecast, see `ndp_gym.layer_forecast.Learned`.
        max_windows: windows per episode.
        others: see `NDPPlacementEnv`.

    Beside every copy a second one replays the same requests on the same machine with the planner
    left alone, and rewards are what the agents gain over it: no action changes what is subtracted,
    so that it only takes away the noise of requests and machines. ``info["episode"]`` of a copy's
    first layer has the return of the environment's own reward.

    Raises:
        ValueError: an argument is out of range, or recording, model and system do not agree.
        OSError: the recording cannot be read.
    """

    def __init__(
        self,
        n_lanes: int = 8,
        *,
        trace: TraceLike = None,
        model: ModelLike = None,
        system: SystemLike = None,
        batch_size: int = 8,
        window: int = 16,
        hbm_budget: HbmBudget = 0.10,
        split: str = "train",
        scheduling: Scheduling = "continuous",
        max_windows: int = 64,
        quality_weight: str | float = "balanced",
        quality: QualityLike = None,
        conditions: str | Conditions | None = None,
        own: float = 0.0,
        base: Mapping[str, float] | None = None,
        forecast: NDArray[np.float64] | None = None,
    ) -> None:
        """Open the recording; nothing is reset yet."""
        if not 0 <= own <= 1:
            raise ValueError(f"own must be in 0..1, got {own}")
        self.render_mode = None
        opened = open_trace(trace)
        found_model, found_system = find_model(model, opened), find_system(system)
        self.lanes = Lanes(
            opened, found_model, found_system, n_lanes=2 * n_lanes,
            batch_size=batch_size, window=window, hbm_budget=hbm_budget, scheduling=scheduling,
            quality=find_quality(quality, found_model, found_system),
            quality_weight=weight_of(quality_weight), conditions=find_conditions(conditions),
        )  # fmt: skip
        self.agents = LayerAgents(
            self.lanes.model, self.lanes.system, self.lanes.simulator.quality,
            self.lanes.base.quality_weight, window, n_lanes=2 * n_lanes,
            profile=train_profile(opened), base=base,
            learned=learned_of(forecast, train_patterns(opened, found_model)),
        )  # fmt: skip
        self.forecast = forecast
        self._requests = opened.split_requests(split)
        self._own, self._max_windows, self.n_copies = own, max_windows, n_lanes
        self._n_layers = self.lanes.model.n_layers
        self._rngs = [np.random.default_rng() for _ in range(n_lanes)]
        self._returns, self._n_windows = np.zeros(n_lanes), np.zeros(n_lanes, np.int64)
        self._started = time.time()
        super().__init__(n_lanes * self._n_layers, len(self.agents.features))

    def reset(self) -> VecEnvObs:
        """Start an episode on every copy; seed ``s`` gives copy i the generator of ``s + i``."""
        if self._seeds[0] is not None:
            self._rngs = [np.random.default_rng(seed) for seed in self._seeds[: len(self._rngs)]]
        for lane in range(self.n_copies):
            self._restart(lane)
        self._reset_seeds()
        return self._observe()

    def step_wait(self) -> VecEnvStepReturn:
        """One window on every copy; those that end begin again at once."""
        lanes, n = self.lanes, self.n_copies
        actions = self._actions.reshape(n, self._n_layers, -1)
        decided = self.agents.decide(np.concatenate([actions, np.zeros_like(actions)]))
        outcome = lanes.advance(*decided)
        weight = lanes.quality_weights
        whole = reward(reward_terms(outcome), weight)
        gained = np.repeat(whole[:, None], self._n_layers, axis=1)
        if self._own > 0:
            own = layer_rewards(outcome, lanes.model, lanes.simulator.quality, weight)
            gained = self._own * own + (1 - self._own) * gained
        rewards = REWARD_SCALE * (gained[:n] - gained[n:])
        self._returns += whole[:n]
        self._n_windows += 1
        ended = lanes.is_done[:n] | (self._n_windows >= self._max_windows)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        observations = self._observe()
        if ended.any():
            observations = self._begin_again(np.flatnonzero(ended).tolist(), observations, infos)
        done = np.repeat(ended, self._n_layers)
        return observations, rewards.reshape(-1).astype(np.float32), done, infos

    def _begin_again(
        self, ended: list[int], final: NDArray[np.float32], infos: list[dict[str, Any]]
    ) -> NDArray[np.float32]:
        """Note the ends in ``infos`` and reset those copies -> observations of all."""
        for lane in ended:
            first = lane * self._n_layers
            for agent in range(first, first + self._n_layers):
                infos[agent]["terminal_observation"] = final[agent]
                infos[agent]["TimeLimit.truncated"] = True
            infos[first]["episode"] = {
                "r": float(self._returns[lane]),
                "l": int(self._n_windows[lane]),
                "t": time.time() - self._started,
            }
            self._restart(lane)
        return self._observe(ended)

    def _restart(self, lane: int) -> None:
        lanes = self.lanes
        domain = lanes.trace.requests.domain
        order, condition = lanes.drawn_from.draw_episode(
            self._rngs[lane], lanes.base, self._requests, domain
        )
        for twin in (lane, self.n_copies + lane):
            lanes.reset(twin, order, condition)
            self.agents.reset(twin, condition.system, condition.quality_weight)
        self._returns[lane], self._n_windows[lane] = 0.0, 0

    def _observe(self, restarted: Sequence[int] = ()) -> NDArray[np.float32]:
        """[N * L, F]; after a first look at this window only ``restarted`` lanes learn anew."""
        only = [lane + twin for lane in restarted for twin in (0, self.n_copies)]
        features = self.agents.observe(self.lanes.observe(), only or None, self.n_copies)
        return features.reshape(self.num_envs, -1)


class LayerVecEnvs(_Agents):
    """Several `LayerVecEnv` as one, the agents of the first before those of the next.

    Recordings, models and machines may differ, so that one network learns from all of them. Group
    ``g`` seeded with ``s`` runs as it would alone with ``s`` plus the agents before it.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, groups: Sequence[LayerVecEnv]) -> None:
        """Join ``groups``; nothing is reset yet."""
        if not groups:
            raise ValueError("groups must have at least one environment, got none")
        self.render_mode = None
        self.groups = list(groups)
        self.agents, self.forecast = self.groups[0].agents, self.groups[0].forecast
        self._ends = np.cumsum([group.num_envs for group in groups])
        super().__init__(int(self._ends[-1]), len(self.agents.features))

    @property
    def windows_per_step(self) -> int:
        """Decode windows that one step replays: one per copy."""
        return sum(group.n_copies for group in self.groups)

    def reset(self) -> VecEnvObs:
        """Start an episode on every copy of every group."""
        for group, first in zip(self.groups, (0, *self._ends[:-1]), strict=True):
            if self._seeds[first] is not None:
                group.seed(self._seeds[first])
        self._reset_seeds()
        return np.concatenate([group.reset() for group in self.groups])

    def step_wait(self) -> VecEnvStepReturn:
        """One window on every copy of every group."""
        parts = np.split(self._actions, self._ends[:-1])
        steps = [group.step(part) for group, part in zip(self.groups, parts, strict=True)]
        observations, rewards, done = (
            np.concatenate([np.asarray(step[i]) for step in steps]) for i in range(3)
        )
        return observations, rewards, done, [info for step in steps for info in step[3]]
