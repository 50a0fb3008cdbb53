"""The native vector environment as a `VecEnv` of Stable-Baselines3.

SB3 refuses Gymnasium's vector environments, and stepping copies one by one wastes the compiled
batch. Episodes, rewards and infos are those that SB3's own ``DummyVecEnv`` and ``Monitor`` give.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnv,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

import ndp_gym

__all__ = ["VectorAsVecEnv", "make_sb3_env"]


def make_sb3_env(env_id: str = ndp_gym.ENV_ID, num_envs: int = 1, **kwargs: Any) -> VecEnv:
    """``num_envs`` copies of the environment for SB3; ``kwargs`` as for `NDPPlacementEnv`.

    Observations are in SI units, from bytes to seconds: put SB3's ``VecNormalize`` around it.

    Raises:
        ValueError: an argument is out of range, or recording, model and system do not agree.
        OSError: the recording cannot be read.
    """
    envs = gym.make_vec(
        env_id,
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="same_step",
        **kwargs,
    )
    return VectorAsVecEnv(envs)


class VectorAsVecEnv(VecEnv):
    """Any Gymnasium vector environment with same-step autoreset, as SB3 sees it.

    Args:
        envs: the environment; ``metadata["autoreset_mode"]`` must be ``SAME_STEP``.

    Raises:
        ValueError: it resets at another time, which SB3 has no words for.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        """Wrap ``envs``; nothing is reset yet."""
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"envs must reset in the same step (SAME_STEP), got {mode}")
        self.envs = envs
        self._actions: NDArray[Any] = np.empty(0)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, np.int64)
        self._started = time.time()
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Start an episode on every copy, with what `seed` and `set_options` left for it.

        Raises:
            ValueError: copies were given different options.
        """
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError("options must be the same for all copies")
        seeds: Any = list(self._seeds)  # Gymnasium's types know only one seed, its environments all
        observations, infos = self.envs.reset(seed=seeds, options=options or None)
        self.reset_infos = _by_copy(infos, np.ones(self.num_envs, np.bool_))
        self._returns.fill(0)
        self._lengths.fill(0)
        self._reset_seeds()
        self._reset_options()
        return observations  # type: ignore[no-any-return]

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions [N, ...] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """One window on every copy; those that end begin again at once."""
        observations, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        done = terminated | truncated
        self._returns += rewards
        self._lengths += 1
        by_copy = _by_copy(infos, ~done)
        for info in by_copy:
            info["TimeLimit.truncated"] = False
        if done.any():
            final = _by_copy(infos["final_info"], done)
            restarted = _by_copy(infos, done)
            for copy in np.flatnonzero(done).tolist():
                by_copy[copy] = final[copy] | {
                    "terminal_observation": infos["final_obs"][copy],
                    "TimeLimit.truncated": bool(truncated[copy] and not terminated[copy]),
                    "episode": self._episode(copy),
                }
                self.reset_infos[copy] = restarted[copy]
        return observations, rewards.astype(np.float32), done, by_copy

    def _episode(self, copy: int) -> dict[str, float]:
        """Return, length and time of the episode that has just ended, as SB3's Monitor has them."""
        episode = {
            "r": round(float(self._returns[copy]), 6),
            "l": int(self._lengths[copy]),
            "t": round(time.time() - self._started, 6),
        }
        self._returns[copy], self._lengths[copy] = 0.0, 0
        return episode

    def close(self) -> None:
        """Close the copies."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the vector environment, once per copy."""
        return [getattr(self.envs.unwrapped, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all copies.

        Raises:
            ValueError: only some are named; the copies share their attributes.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"copies share their attributes: set {attr_name!r} of all or none")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call the batched method, which answers for all copies, and pick the rows asked for."""
        answers = getattr(self.envs.unwrapped, method_name)(*method_args, **kwargs)
        return [None if answers is None else answers[i] for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether copies do what ``wrapper_class`` does: only Monitor's episode statistics."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]


def _by_copy(infos: dict[str, Any], mask: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """One info per copy from Gymnasium's columns; empty where ``mask`` is False."""
    found: list[dict[str, Any]] = [{} for _ in mask]
    wanted = np.flatnonzero(mask).tolist()
    for name, column in infos.items():
        has = infos.get(f"_{name}")
        if has is None or name in ("final_obs", "final_info"):
            continue
        if isinstance(column, dict):
            for copy, inner in enumerate(_by_copy(column, mask & has)):
                if inner:
                    found[copy][name] = inner
            continue
        values: Sequence[Any] = column.tolist() if np.ndim(column) == 1 else column
        for copy in wanted:
            if has[copy]:
                found[copy][name] = values[copy]
    return found
