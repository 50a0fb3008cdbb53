"""`NDPPlacementVectorEnv`: many copies of the environment that step in one call of the simulator.

Observations, rewards and infos of copy ``i`` are those of the single environment with seed
``seed + i``; infos are laid out as by Gymnasium's `SyncVectorEnv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ndp_gym.budget import HbmBudget
from ndp_gym.conditions import Conditions
from ndp_gym.env import NDPPlacementEnv, check_render_mode, render_lane
from ndp_gym.episodes import Episodes, Stepped
from ndp_gym.inputs import ModelLike, QualityLike, SystemLike, TraceLike
from ndp_gym.lanes import Observations
from ndp_gym.schedule import Scheduling, check_count

__all__ = ["NDPPlacementVectorEnv"]

BoolArray = NDArray[np.bool_]


class NDPPlacementVectorEnv(VectorEnv[Observations, NDArray[Any], NDArray[Any]]):
    """``num_envs`` copies of `NDPPlacementEnv`, whose data sheet describes the arguments.

    Args:
        num_envs: copies N.
        autoreset_mode: what happens to a copy whose episode has ended. ``"next_step"``: its next
            step ignores the action and resets it. ``"same_step"``: it is reset at once, the last
            observation and info stand in ``infos["final_obs"]`` and ``infos["final_info"]``.
            ``"disabled"``: the caller resets with ``options={"reset_mask": mask}``.
        others: see `NDPPlacementEnv`.
    """

    metadata: dict[str, Any] = NDPPlacementEnv.metadata

    def __init__(
        self,
        num_envs: int = 1,
        trace: TraceLike = None,
        model: ModelLike = None,
        system: SystemLike = None,
        batch_size: int = 8,
        window: int = 16,
        hbm_budget: HbmBudget | Sequence[float] = 0.10,
        split: str = "train",
        scheduling: Scheduling = "continuous",
        max_windows: int | None = 64,
        action: str = "scores",
        quality_weight: str | float = "balanced",
        quality: QualityLike = None,
        conditions: str | Conditions | None = None,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = "next_step",
    ) -> None:
        """Open the recording and size the spaces of all copies.

        Raises:
            ValueError: an argument is out of range, or recording, model and system do not agree.
            OSError: the recording cannot be read.
        """
        check_count("num_envs", num_envs)
        check_render_mode(render_mode)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**NDPPlacementEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.episodes = Episodes(
            num_envs,
            trace=trace,
            model=model,
            system=system,
            batch_size=batch_size,
            window=window,
            hbm_budget=hbm_budget,
            split=split,
            scheduling=scheduling,
            max_windows=max_windows,
            action=action,
            quality_weight=quality_weight,
            quality=quality,
            conditions=conditions,
        )
        self.single_observation_space = self.episodes.observation_space
        self.single_action_space = self.episodes.encoding.space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._ended = np.ones(num_envs, np.bool_)
        self._never_reset = True

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, dict[str, Any]]:
        """Start an episode on every copy, or on those in ``options["reset_mask"]``.

        Args:
            seed: copy ``i`` gets ``seed + i``; a list gives each its own; ``None`` goes on with the
                generators there are.
            options: as for the single environment, the same for all copies.

        Raises:
            ValueError: options are unknown or name requests that cannot run.
        """
        seeds = self._seeds(seed)
        options = dict(options or {})
        mask = self._reset_mask(options.pop("reset_mask", None))
        infos: dict[str, Any] = {}
        for lane in np.flatnonzero(mask).tolist():
            rng = self._rngs[lane]
            if rng is None or seeds[lane] is not None:
                self._rngs[lane], _ = seeding.np_random(seeds[lane])
            infos = self._restart(lane, infos, options)
        self._never_reset = False
        return self.episodes.observe(), infos

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Observations, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One window on every copy; actions [N, ...].

        Raises:
            ResetNeeded: an episode has not begun, or has ended and autoreset is disabled.
            ValueError: actions have the wrong shape or mean nothing.
        """
        mode = self.autoreset_mode
        if self._never_reset or (mode is AutoresetMode.DISABLED and self._ended.any()):
            lanes = np.flatnonzero(self._ended).tolist()
            raise ResetNeeded(f"episodes {lanes} have ended or not begun: call reset()")
        idle = self._ended if self._ended.any() else None
        stepped = self.episodes.step(np.asarray(actions), idle)
        truncated = stepped.truncated
        stepping = np.ones(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        if idle is not None:  # next-step mode: the last step ended these
            truncated, stepping = truncated & ~idle, ~idle
            for lane in np.flatnonzero(idle).tolist():
                infos = self._restart(lane, infos)
        if mode is AutoresetMode.SAME_STEP and truncated.any():
            infos = self._final(stepped, truncated)
            stepping = ~truncated
            for lane in np.flatnonzero(truncated).tolist():
                infos = self._restart(lane, infos)
        else:
            self._ended = truncated.copy()
        if stepping.any():
            infos |= _masked(stepped, stepping)
        return (
            self.episodes.observe(),
            stepped.rewards,
            np.zeros(self.num_envs, np.bool_),
            truncated,
            infos,
        )

    def render(self) -> tuple[str, ...] | None:
        """The text of every copy's placement where ``render_mode`` is ``"ansi"``."""
        if self.render_mode is None:
            return None
        return tuple(render_lane(self.episodes, lane) for lane in range(self.num_envs))

    def _restart(
        self, lane: int, infos: dict[str, Any], options: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        rng = self._rngs[lane]
        assert rng is not None
        self._ended[lane] = False
        return self._add_info(infos, self.episodes.reset(lane, rng, options), lane)

    def _final(self, stepped: Stepped, truncated: BoolArray) -> dict[str, Any]:
        """Last observation and info of the copies that have just ended."""
        observations = self.episodes.observe()
        final = np.full(self.num_envs, None, dtype=object)
        for lane in np.flatnonzero(truncated).tolist():
            final[lane] = {name: array[lane].copy() for name, array in observations.items()}
        return {
            "final_obs": final,
            "_final_obs": truncated.copy(),
            "final_info": _masked(stepped, truncated),
            "_final_info": truncated.copy(),
        }

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must have num_envs={self.num_envs} entries, got {len(seed)}")
        return list(seed)

    def _reset_mask(self, mask: BoolArray | None) -> BoolArray:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a boolean array [{self.num_envs}] with at least "
                f"one True, got {mask!r}"
            )
        if self._never_reset and not mask.all():
            raise ResetNeeded("the first reset() must be of all copies")
        return mask


def _masked(stepped: Stepped, mask: BoolArray) -> dict[str, Any]:
    """The window's infos, zero outside ``mask``, with the mask under ``_name`` for each."""
    infos: dict[str, Any] = {}
    is_full = bool(mask.all())
    for name, column in stepped.infos.items():
        if not is_full:
            column = column.copy()
            column[~mask] = 0
        infos[name], infos[f"_{name}"] = column, mask
    return infos


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    """The member that a name (any case, ``"next_step"`` or ``"NextStep"``) means."""
    if isinstance(mode, AutoresetMode):
        return mode
    names = {member.name.lower(): member for member in AutoresetMode}
    key = mode.lower()
    for name, member in names.items():
        if key in (name, name.replace("_", "")):
            return member
    raise ValueError(f"autoreset_mode must be one of {list(names)}, got {mode!r}")
