"""`balance` whose costs follow the clock: what the machine really takes is learnt on the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import CostTable
from ndp_gym.fillings import far_seconds
from ndp_gym.forecast import Forecast, expected, shares
from ndp_gym.plan import FAR, HBM, Plan
from ndp_gym.policy import Observation, PolicyContext, context_entry
from policies.balance import Balance

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FACTOR_RANGE = (0.125, 8.0)
"""Seconds over nominal seconds that are believed; what lies outside counts as the end (assumed)."""


class BalanceFeedback(Balance):
    """Formulation H4fb of the placement study: `Balance` and an integral term on measured seconds.

    After every window the seconds that the observation reports for GPU, far device and link are
    compared with what the nominal costs say for the routing and the copies of that window. The
    logarithm of the ratio is integrated, per device over all layers, and the planner's costs are
    multiplied by it. (The study integrates log(GPU seconds / far seconds) as one number; the
    layers' maximum balances either way, but seconds are also weighed against quality.)

    Args:
        gain: share of the remaining error that a window corrects, 0 for plain `Balance`.
        constants: as for `Balance`.
    """

    def __init__(self, gain: float = 0.3, **constants: float) -> None:
        """Set constants by name.

        Raises:
            ValueError: a constant does not exist, or ``gain`` is not in 0..1.
        """
        super().__init__(**constants)
        if not 0 <= gain <= 1:
            raise ValueError(f"gain must be in 0..1, got {gain}")
        self.gain = gain

    def reset(self, context: PolicyContext) -> None:
        """Trust the nominal costs again."""
        super().reset(context)
        self.nominal = self.facts
        self.factors = np.ones(3)
        self.before: tuple[Observation, Plan] | None = None

    def __call__(self, observation: Observation) -> Plan:
        """The balanced plan at the costs learnt so far."""
        if self.before is not None and self.gain > 0:
            self._learn(observation, *self.before)
        plan = super().__call__(observation)
        self.before = observation, plan
        return plan

    def _learn(self, observation: Observation, before: Observation, plan: Plan) -> None:
        """Correct the costs by the window between two observations."""
        routed = self._routed(observation)
        if routed is None:
            return
        end = _where(observation)
        start = _start(before, plan, end)
        table, in_place = self.nominal.table, self.nominal.in_place
        bounds = [predicted(table, in_place, routed, *copies) for copies in (start, end)]
        nominal = Seconds(*(0.5 * (one + other) for one, other in zip(*bounds, strict=True)))
        seconds = observation["layer"].astype(np.float64).sum(axis=0)
        self.factors = self._corrected(nominal, seconds)
        gpu, far, link = self.factors
        scaled = table._replace(
            gpu_weight_s=gpu * table.gpu_weight_s,
            gpu_token_s=gpu * table.gpu_token_s,
            far_weight_s=far * table.far_weight_s,
            far_token_s=far * table.far_token_s,
            copy_s=link * table.copy_s,
            activation_token_s=link * table.activation_token_s,
            link_bytes_per_s=table.link_bytes_per_s / link,
        )
        self.facts = self.nominal._replace(table=scaled)

    def _corrected(self, nominal: Seconds, measured: FloatArray) -> FloatArray:
        """The factors [3] of GPU, far device and link, one step nearer to what was measured."""
        constant = np.array([nominal.launch, 0.0, nominal.latency])
        scales = np.array([nominal.gpu, nominal.far, nominal.link])
        known = (scales > 0) & (measured[:3] > constant)
        seen = np.where(known, measured[:3] - constant, 1.0) / np.where(known, scales, 1.0)
        error = np.log(seen.clip(*FACTOR_RANGE)) - np.log(self.factors)
        corrected: FloatArray = self.factors * np.exp(self.gain * known * error)
        return corrected

    def _routed(self, observation: Observation) -> Forecast | None:
        """What the last window routed; ``None`` before there is one."""
        load = observation["last_load"].astype(np.float64)
        if not load.any():
            return None
        top_k = self.context.model.top_k
        context = context_entry(observation, "n_live") * context_entry(observation, "mean_context")
        n_tokens = float(load.sum(axis=1).mean()) / top_k
        return expected(shares(load), n_tokens, context, top_k)


class Seconds(NamedTuple):
    """Of a decode step, all layers together: what scales with a device's speed, and what not."""

    gpu: float
    far: float
    link: float
    launch: float
    latency: float


def predicted(
    table: CostTable, in_place: bool, routed: Forecast, hbm_bits: IntArray, far_bits: IntArray
) -> Seconds:
    """Nominal seconds of the routed experts where ``hbm_bits`` [L, E] are in HBM (0 = far).

    ``far_bits`` [L, E] are the widths of the others.
    """
    is_hot = hbm_bits > 0
    index = table.index_of[np.where(is_hot, hbm_bits, far_bits)]
    weights_s = routed.active * table.gpu_weight_s[index]
    on_gpu = is_hot if in_place else np.ones_like(is_hot)
    n_tokens = (routed.load * on_gpu).sum(axis=1)
    gpu_s = np.maximum((weights_s * on_gpu).sum(axis=1), n_tokens * table.gpu_token_s)
    launch_s = 0.0
    for width, one_s in enumerate(table.gpu_launch_s):
        used = np.where(on_gpu & (index == width), routed.active, 0.0)
        launch_s += float(one_s * (1 - np.prod(1 - used, axis=1)).sum())
    if not in_place:
        copies_s = float((routed.active * table.copy_s[index])[~is_hot].sum())
        return Seconds(float(gpu_s.sum()), 0.0, copies_s, launch_s, 0.0)
    far_s = np.take_along_axis(far_seconds(table, True, routed), index[..., None], 2)[..., 0]
    share = np.minimum((routed.load * is_hot).sum(axis=1) / routed.load.sum(axis=1), 1.0)
    stays = share**routed.top_k
    crossing = routed.n_tokens * (1 - stays)
    return Seconds(
        gpu=float(gpu_s.sum()),
        far=float(far_s[~is_hot].sum()),
        link=float((crossing * table.activation_token_s).sum()),
        launch=launch_s,
        latency=float((2 * table.link_latency_s * (1 - stays**routed.n_tokens)).sum()),
    )


def _where(observation: Observation) -> tuple[IntArray, IntArray]:
    """[L, E] widths in HBM, 0 = far, and widths far."""
    bits = observation["bitwidth"].astype(np.int64)
    return np.where(observation["tier"] == HBM, bits, 0), bits


def _start(
    before: Observation, plan: Plan, end: tuple[IntArray, IntArray]
) -> tuple[IntArray, IntArray]:
    """Where experts were once ``plan`` was made and nothing had arrived; see `_where`."""
    hbm, bits = _where(before)
    if not hbm.any():  # the first plan of an episode loads before the window
        return end
    is_far = plan.placement.tier == FAR
    planned = plan.placement.bitwidth.astype(np.int64)
    return np.where(is_far, 0, hbm), np.where(is_far, planned, bits)
