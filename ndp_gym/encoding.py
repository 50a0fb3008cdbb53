"""Actions to plans: the three encodings of a plan as a Gymnasium action.

An encoding has a ``space`` and turns the actions of N lanes into tier, bits and order [N, L, E].
It reads the lanes' present state, never their recording.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ndp_gym.condition import Condition
from ndp_gym.forecast import Blend, Forecaster
from ndp_gym.lanes import Lanes
from ndp_gym.plan import FAR, HBM, Plan
from ndp_gym.planners import Copies, Facts, Guesses, Knobs, balance, facts_of
from ndp_gym.policy import Observation, budget_bytes, context_entry
from ndp_gym.specs import Service

LEVELS = ("fill", "hbm_width", "far_width", "keep")
"""Allocation levels at the end of a ``scores`` action, in the order of `ndp_gym.decoders`."""
KNOBS = {
    "gpu_factor": 2.0,
    "far_factor": 2.0,
    "price": 4.0,
    "hysteresis": 8.0,
    "migration_cap": 4.0,
    "min_gain": 8.0,
    "prefill_tokens": 8.0,
}
"""Constants that ``knobs`` steers and their factor at +1 (its inverse at -1); 0 is the default."""


class Decoded(NamedTuple):
    """Plans of N lanes; without ``order`` load ranks, without ``services`` the system's holds."""

    tier: NDArray[np.uint8]
    bits: NDArray[np.uint8]
    order: NDArray[np.float64] | None
    services: list[Service] | None = None


class Encoding(Protocol):
    """Turns actions into plans; ``sets_service``: also into how misses are served."""

    sets_service: bool

    @property
    def space(self) -> spaces.Space[Any]:
        """The action space of one lane."""

    def reset(self, lane: int, lanes: Lanes) -> None:
        """Forget the last episode of one lane, whose next one has begun."""

    def decode(self, actions: NDArray[Any], lanes: Lanes) -> Decoded:
        """The plans behind ``actions`` [N, ...] in the lanes' present state.

        Raises:
            ValueError: an action is not in the space in a way that has no meaning.
        """


class Scores:
    """A priority per (layer, expert) and four allocation levels, all in [-1, 1].

    Whatever the action, the plan fits the budget: experts move into HBM in order of priority while
    there is room. ``fill`` is the share of the budget to use, ``hbm_width`` and ``far_width`` run
    from the narrowest to the widest stored width (between two of them, experts of high priority
    get the wider), ``keep`` adds 0..1 to the priority of experts that the last plan had in HBM.
    Numbers outside [-1, 1] are clipped.
    """

    sets_service = False

    def __init__(self, lanes: Lanes) -> None:
        """Sized for the lanes' model."""
        table = lanes.simulator.costs[0].prices.table
        self._widths = table.bits, table.weight_bytes, table.index_of
        self._decoders = import_module("ndp_gym.decoders")  # numba comes with it
        self._n_experts = lanes.shape[0] * lanes.shape[1]
        self.space = spaces.Box(-1.0, 1.0, (self._n_experts + len(LEVELS),), np.float32)

    def reset(self, lane: int, lanes: Lanes) -> None:
        """Nothing is remembered."""

    def decode(self, actions: NDArray[Any], lanes: Lanes) -> Decoded:
        """The feasible plans; see the class."""
        shape = (lanes.n_lanes, self._n_experts)
        actions = _shaped(actions, (lanes.n_lanes, *self.space.shape), np.float32)
        state = lanes.simulator.state
        order, keys = np.empty(shape), np.empty(shape, np.int64)
        if not self._decoders.rank_keys(actions, state.target, order, keys):
            raise ValueError("scores must be finite, got nan or inf")
        keys.sort(axis=1)
        tier, bits = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        self._decoders.allocate(
            actions, keys, state.hbm, lanes.budgets(), *self._widths, tier, bits
        )
        experts = (lanes.n_lanes, *lanes.shape)
        return Decoded(tier.reshape(experts), bits.reshape(experts), order.reshape(experts))


class Menu:
    """One choice per (layer, expert): the system's (tier, bitwidth) pairs, HBM first, widest first.

    A plan over budget is repaired, and counted, by the simulator; recent load ranks the experts.
    """

    sets_service = False

    def __init__(self, lanes: Lanes) -> None:
        """Sized for the lanes' model and system."""
        widths = lanes.system.stored_bits
        self.pairs = tuple((tier, bits) for tier in (HBM, FAR) for bits in widths)
        self._tier, self._bits = np.array(self.pairs, np.uint8).T.copy()
        n_experts = lanes.shape[0] * lanes.shape[1]
        self.space = spaces.MultiDiscrete(np.full(n_experts, len(self.pairs)))

    def reset(self, lane: int, lanes: Lanes) -> None:
        """Nothing is remembered."""

    def decode(self, actions: NDArray[Any], lanes: Lanes) -> Decoded:
        """The chosen pairs.

        Raises:
            ValueError: a choice is not on the menu.
        """
        choice = _shaped(actions, (lanes.n_lanes, *self.space.shape), np.int64)
        if choice.min() < 0 or choice.max() >= len(self.pairs):
            raise ValueError(
                f"placement must be in 0..{len(self.pairs) - 1}, got {choice.min()}..{choice.max()}"
            )
        choice = choice.reshape(lanes.n_lanes, *lanes.shape)
        return Decoded(self._tier[choice], self._bits[choice], None)


class KnobSettings:
    """A few numbers in [-1, 1] that steer the ``balance`` planner; 0 is its default constants.

    Each multiplies one constant by ``KNOBS[name] ** a``; the last lengthens (a > 0) or shortens
    the planner's memory of past windows. Numbers outside [-1, 1] are clipped.
    """

    sets_service = True

    def __init__(self, lanes: Lanes) -> None:
        """The planner for the nominal system of each lane."""
        self._told = [lanes.base] * lanes.n_lanes
        self._facts = [_facts(lanes.base, lanes)] * lanes.n_lanes
        self._top_k = lanes.model.top_k
        self._forecasters = [self._forecaster() for _ in range(lanes.n_lanes)]
        self._guesses: list[Guesses] = [()] * lanes.n_lanes
        self.space = spaces.Box(-1.0, 1.0, (len(KNOBS) + 1,), np.float32)

    def reset(self, lane: int, lanes: Lanes) -> None:
        """Forget past routing, and read the facts that policies are told."""
        told, last = lanes.conditions[lane], self._told[lane]
        if told.system is not last.system or told.quality_weight != last.quality_weight:
            self._facts[lane] = _facts(told, lanes)
        self._told[lane] = told
        self._forecasters[lane] = self._forecaster()
        self._guesses[lane] = ()

    def decode(self, actions: NDArray[Any], lanes: Lanes) -> Decoded:
        """The planner's plans, lane by lane."""
        actions = _shaped(actions, (lanes.n_lanes, *self.space.shape), np.float64)
        if not np.isfinite(actions).all():
            raise ValueError("knobs must be finite, got nan or inf")
        experts = (lanes.n_lanes, *lanes.shape)
        tier, bits = np.empty(experts, np.uint8), np.empty(experts, np.uint8)
        order, services = np.empty(experts), []
        observations = lanes.observe()
        for lane, action in enumerate(actions.clip(-1, 1)):
            observation = {name: array[lane] for name, array in observations.items()}
            plan = self._plan(lane, lanes, action, observation)
            assert plan.migration_order is not None
            tier[lane], bits[lane] = plan.placement.tier, plan.placement.bitwidth
            order[lane] = plan.migration_order
            services.append(plan.service or lanes.system.default_service)
        return Decoded(tier, bits, order, services)

    def _plan(
        self, lane: int, lanes: Lanes, action: NDArray[np.float64], observation: Observation
    ) -> Plan:
        knobs, blend = steered(action)
        if context_entry(observation, "n_admitted") > 0:
            self._guesses[lane] = ()  # other requests: search the prices afresh
        self._forecasters[lane].blend = blend
        plan, self._guesses[lane] = balance(
            self._facts[lane],
            self._forecasters[lane](observation),
            _copies(lanes, lane),
            budget_bytes(observation),
            knobs,
            self._guesses[lane],
        )
        return plan

    def _forecaster(self) -> Forecaster:
        return Forecaster(Blend(), self._top_k)


def _facts(told: Condition, lanes: Lanes) -> Facts:
    quality = lanes.simulator.quality
    return facts_of(lanes.model, told.system, quality, told.quality_weight, lanes.window)


ENCODINGS: dict[str, type[Scores] | type[Menu] | type[KnobSettings]] = {
    "scores": Scores,
    "placement": Menu,
    "knobs": KnobSettings,
}


def encoding_of(name: str, lanes: Lanes) -> Encoding:
    """The encoding ``name`` for these lanes.

    Raises:
        ValueError: there is no such encoding.
    """
    if name not in ENCODINGS:
        raise ValueError(f"action must be one of {list(ENCODINGS)}, got {name!r}")
    return ENCODINGS[name](lanes)


def steered(action: NDArray[np.float64]) -> tuple[Knobs, Blend]:
    """The planner's constants for a ``knobs`` action in [-1, 1]."""
    default_knobs, default_blend = Knobs(), Blend()
    of_knobs = {f.name for f in fields(Knobs)}
    knobs, blend = {}, {}
    for (name, factor), level in zip(KNOBS.items(), action[:-1].tolist(), strict=True):
        if name in of_knobs:
            knobs[name] = getattr(default_knobs, name) * factor**level
        else:
            blend[name] = getattr(default_blend, name) * factor**level
    blend["decay"] = 1 - (1 - default_blend.decay) * 4.0 ** -float(action[-1])
    return Knobs(**knobs), Blend(**blend)


def _copies(lanes: Lanes, lane: int) -> Copies:
    """What the last plan left, from the lane's state; nothing was planned before the first."""
    state = lanes.simulator.state
    target, far = (a[lane].reshape(lanes.shape).astype(np.int64) for a in (state.target, state.far))
    return Copies(
        planned=np.where(target > 0, target, far),
        present=state.hbm[lane].reshape(lanes.shape).astype(np.int64),
    )


def _shaped(actions: NDArray[Any], shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """``actions`` as an array of ``dtype``; any shape but ``shape`` is a ``ValueError``."""
    array = np.asarray(actions)
    if array.shape != shape:
        raise ValueError(f"actions must have shape {shape}, got {array.shape}")
    if dtype is np.int64 and array.dtype.kind not in "iu":
        raise ValueError(f"actions must be integers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype)
