"""Layer agents: every routed layer decides for itself, and all share one policy.

An agent sees dimensionless features of its layer and answers with four numbers in [-1, 1], which
bend what the `balance` planner would do there (`ndp_gym.planners.Nudges`); zeros leave it alone.
The planner's costs follow the measured seconds (`ndp_gym.speeds`). Nothing depends on the number of
layers or experts, so an agent trained on one model runs on any. HBM is rationed by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.batch import over_lanes
from ndp_gym.forecast import Blend, Forecast, expected
from ndp_gym.lanes import CONTEXT_NAMES, Observations
from ndp_gym.layer_facts import LaneFacts
from ndp_gym.layer_features import FEATURES, Estimate, features_of, outside_s
from ndp_gym.layer_forecast import LaneForecaster, Learned, Routing, entry
from ndp_gym.outcome import Outcome
from ndp_gym.plan import HBM, Plan
from ndp_gym.planners import Copies, Facts, Guesses, Knobs, Nudges, balance, constants_of, facts_of
from ndp_gym.quality import QualityModel, layer_weights
from ndp_gym.rules import check_number
from ndp_gym.specs import MoESpec, Service, SystemSpec
from ndp_gym.speeds import GAIN, LaneSpeeds, scaled

__all__ = ["ACTIONS", "Decided", "LayerAgents", "base_constants", "layer_rewards"]

FloatArray = NDArray[np.float64]

ACTIONS = ("far_value", "price", "hysteresis", "mix")
"""What the four numbers steer.

``far_value``: seconds of the far device count ``2 ** a``-fold when experts are chosen for HBM;
``price``: seconds against quality, ``2 ** a``; ``hysteresis``: seconds of copies, ``16 ** a``;
``mix``: expected routing, -1 the prompts, 0 the usual blend, 1 the last windows.
"""


_ADMITTED, _LIVE, _MEAN_CONTEXT, _BUDGET = (
    CONTEXT_NAMES.index(name)
    for name in ("n_admitted", "n_live", "mean_context", "hbm_budget_bytes")
)


class Decided(NamedTuple):
    """Plans of N lanes: tier, bits and migration order, [N, L, E] each, and N services."""

    tier: NDArray[np.uint8]
    bits: NDArray[np.uint8]
    order: FloatArray
    services: list[Service]


def base_constants(base: Mapping[str, float]) -> tuple[Knobs, Blend, float]:
    """Planner, forecast and gain of the speeds with the constants ``base`` by name.

    Raises:
        ValueError: a constant does not exist or is not in its range.
    """
    constants = {"gain": GAIN, **base}
    gain = constants.pop("gain")
    check_number("gain", "in 0..1", gain)
    return *constants_of(constants), gain


class LayerAgents:
    """Features of and plans for the layers of N lanes; call `observe`, then `decide`, per window.

    Args:
        model: sizes.
        system: the nominal system of lanes that `reset` gives no other.
        quality: error model.
        quality_weight: reward lost per nat, likewise.
        window: decode steps per plan.
        n_lanes: lanes N.
        profile: [L, E] loads on the train split, where known.
        features: (offset, scale) of the features used, by name and in this order.
        base: constants of the planner by name, as of `balance_feedback`.
        learned: a fitted forecast in place of the planner's blend.

    Raises:
        ValueError: a feature or a constant does not exist.
    """

    def __init__(
        self,
        model: MoESpec,
        system: SystemSpec,
        quality: QualityModel,
        quality_weight: float,
        window: int,
        *,
        n_lanes: int = 1,
        profile: ArrayLike | None = None,
        features: Mapping[str, tuple[float, float]] = FEATURES,
        base: Mapping[str, float] | None = None,
        learned: Learned | None = None,
    ) -> None:
        """Read the nominal costs; every lane then waits for `reset`."""
        unknown = sorted(features.keys() - FEATURES.keys())
        if unknown:
            raise ValueError(f"layer agents have no features {unknown}; they have {list(FEATURES)}")
        self.features = dict(features)
        self.base = dict(base or {})
        self._knobs, self._blend, gain = base_constants(self.base)
        self._shape = (model.n_layers, model.n_experts)
        self._top_k, self._window = model.top_k, window
        self._told = system, quality_weight
        self._model, self._quality = model, quality
        facts = self._facts_of(*self._told)
        self._lane_facts = [facts] * n_lanes
        self._lane_told = [self._told] * n_lanes
        self._nominal = LaneFacts(facts, n_lanes)
        self._speeds = LaneSpeeds(n_lanes, model.top_k, gain)
        self._weights, self._learned = layer_weights(model), learned
        self._forecaster = LaneForecaster(n_lanes, self._shape, profile, self._blend, learned)
        self._planned = np.zeros((n_lanes, *self._shape), np.int64)
        self._guesses: list[Guesses] = [()] * n_lanes
        self._seen: tuple[Observations, Routing, FloatArray] | None = None

    def _facts_of(self, system: SystemSpec, quality_weight: float) -> Facts:
        return facts_of(self._model, system, self._quality, quality_weight, self._window)

    def reset(
        self, lane: int, system: SystemSpec | None = None, quality_weight: float | None = None
    ) -> None:
        """Start one lane's episode, with other nominal facts than at construction if given."""
        usual, weight = self._told
        told = system or usual, weight if quality_weight is None else quality_weight
        if told != self._lane_told[lane]:
            self._lane_facts[lane] = self._facts_of(*told)
            self._nominal.put(lane, self._lane_facts[lane])
            self._lane_told[lane] = told
        self._speeds.reset(lane)
        self._forecaster.reset(lane)
        self._planned[lane] = 0
        self._guesses[lane] = ()

    def observe(
        self,
        observations: Observations,
        only: Sequence[int] | None = None,
        n_shown: int | None = None,
    ) -> NDArray[np.float32]:
        """[N, L, F] scaled features from observations [N, ...], clipped to [-5, 5].

        Call it once per window. Where some lanes have been reset since, a second call names
        ``only`` those, so that the others do not count their last window twice. Of the first
        ``n_shown`` lanes alone, [n_shown, L, F], where nobody looks at the others.
        """
        if only is None:
            self._speeds.learn(observations, self._nominal)
        routing = self._forecaster(observations, only)
        self._seen = observations, routing, routing.expected
        shown = slice(n_shown)
        observations = {name: array[shown] for name, array in observations.items()}
        routing = Routing(*(array[shown] for array in routing))
        factors = self._speeds.factors[shown]
        facts = self._nominal.scaled(factors)
        estimate = self._estimate(observations, routing.expected, facts)
        columns = features_of(observations, routing, estimate, facts, self._weights, factors)
        seen = np.empty((*routing.base.shape[:2], len(self.features)))
        for i, name in enumerate(self.features):
            seen[..., i] = columns[name]
        offsets, scales = np.array(list(self.features.values())).T
        clipped: NDArray[np.float32] = ((seen - offsets) / scales).clip(-5, 5).astype(np.float32)
        return clipped

    def decide(self, actions: NDArray[np.floating]) -> Decided:
        """The plans behind ``actions`` [N, L, 4] for what was last observed.

        The HBM bytes of a layer are those that all-zero actions would give it, so that no layer
        can take from another: what it does with them is its own to gain and to lose.

        Raises:
            ValueError: nothing was observed yet, or an action is not finite.
        """
        if not np.isfinite(actions).all():
            raise ValueError("actions of layer agents must be finite, got nan or inf")
        if self._seen is None:
            raise ValueError("observe() must come before decide()")
        observations, seen, share = self._seen
        clipped: FloatArray = np.asarray(actions, np.float64).clip(-1, 1)
        mixed = self._forecaster.mixed(seen, clipped[..., ACTIONS.index("mix")])
        is_near = observations["tier"] == HBM
        present = np.where(is_near, observations["bitwidth"], 0).astype(np.int64)
        usual, own = self._energy(share), self._energy(mixed)
        shape, default = share.shape, self._told[0].default_service
        decided = Decided(
            np.empty(shape, np.uint8), np.empty(shape, np.uint8), np.empty(shape),
            [default] * len(share),
        )  # fmt: skip

        def run(_: int, first: int, last: int) -> None:
            for lane in range(first, last):
                nudges = None
                if clipped[lane].any():
                    far_value, price, hysteresis, _mix = clipped[lane].T
                    bent = self._expected(lane, mixed[lane], own[lane])
                    nudges = Nudges(bent, 2.0**far_value, 2.0**price, 16.0**hysteresis)
                routing = self._expected(lane, share[lane], usual[lane])
                plan = self._plan(lane, routing, present[lane], nudges)
                decided.tier[lane] = plan.placement.tier
                decided.bits[lane] = plan.placement.bitwidth
                decided.order[lane] = plan.migration_order
                decided.services[lane] = plan.service or default

        over_lanes(len(share), run, per_thread=1)
        self.ordered(decided.tier, decided.bits)
        return decided

    def ordered(self, tier: NDArray[np.uint8], bits: NDArray[np.uint8]) -> None:
        """Note the plans [N, L, E] that run, where they are not those of the last `decide`."""
        assert self._seen is not None
        self._planned = bits.astype(np.int64)
        self._speeds.expect(self._seen[0], tier, bits)

    def _energy(self, share: FloatArray) -> FloatArray:
        """[N, L, E] expected shares of gate energy if ``share`` is the routing of the lanes."""
        assert self._seen is not None
        observations, routing, _ = self._seen
        if self._learned is not None:
            n_live = np.maximum(entry(observations["context"], "n_live"), 1.0)
            return self._learned.energy(share, routing.gates, n_live)
        load = observations["ema_load"].astype(np.float64)
        energy, has_load = np.empty(share.shape), load.any(axis=-1).all(axis=-1)
        for lanes in (has_load, ~has_load):
            if lanes.any():
                energy[lanes] = self._blend.energy(share[lanes], routing.gates[lanes], load[lanes])
        return energy

    def _expected(self, lane: int, share: FloatArray, energy: FloatArray) -> Forecast:
        """What one lane expects if ``share`` [L, E] is its routing."""
        assert self._seen is not None
        context = self._seen[0]["context"][lane]
        n_live = max(float(context[_LIVE]), 1.0)
        n_tokens = n_live * float(context[_MEAN_CONTEXT])
        return expected(share, n_live, n_tokens, self._top_k)._replace(energy=energy)

    def _plan(
        self, lane: int, routing: Forecast, present: NDArray[np.int64], nudges: Nudges | None
    ) -> Plan:
        """The plan of one lane, whose copies ``present`` are [L, E] bits."""
        assert self._seen is not None
        context = self._seen[0]["context"][lane]
        facts = self._lane_facts[lane]
        facts = facts._replace(table=scaled(facts.table, self._speeds.factors[lane]))
        if context[_ADMITTED] > 0:
            self._guesses[lane] = ()
        plan, self._guesses[lane] = balance(
            facts,
            routing,
            Copies(planned=self._planned[lane], present=present),
            float(np.floor(context[_BUDGET])),
            self._knobs,
            self._guesses[lane],
            nudges,
        )
        return plan

    def _estimate(
        self, observations: Observations, share: FloatArray, facts: LaneFacts
    ) -> Estimate:
        """Nominal seconds of a decode step for the expected routing, and what was measured."""
        context = observations["context"]
        table = facts.shared.table
        n_tokens = np.maximum(entry(context, "n_live"), 1.0)
        load, active = _expected(share, n_tokens, self._top_k)
        layers_s, rest_s = outside_s(facts, n_tokens, n_tokens * entry(context, "mean_context"))
        middle = int(np.abs(table.bits - 4).argmin())
        weight_s, token_s, copy_s, read_s = (
            column[:, middle, None, None]
            for column in (facts.far_weight_s, facts.far_token_s, facts.copy_s, facts.gpu_weight_s)
        )
        tokens = np.maximum(load / np.maximum(active, 1e-12), table.far_min_tokens)
        one_s = np.maximum(weight_s, tokens * token_s)
        if not facts.shared.far_computes:
            one_s = np.broadcast_to(copy_s + read_s, load.shape)
        far_s = (active * one_s).sum(axis=-1)
        gpu_s = active.sum(axis=-1) * read_s[..., 0]
        seconds = observations["layer"].astype(np.float64)
        measured_s = seconds[..., 0] + seconds[..., 3]
        is_measured = measured_s.any(axis=1, keepdims=True)
        guess_s = np.where(is_measured, measured_s, 0.5 * far_s)
        return Estimate(
            load=load,
            active=active,
            n_tokens=n_tokens,
            outside_s=layers_s,
            far_s=far_s,
            gpu_s=gpu_s,
            experts_s=guess_s,
            step_s=(layers_s + guess_s).sum(axis=1) + rest_s,
            rest_s=rest_s,
        )


def layer_rewards(
    outcome: Outcome,
    model: MoESpec,
    quality: QualityModel,
    quality_weight: float | FloatArray,
) -> FloatArray:
    """[N, L] difference rewards: what each layer adds to the window's reward, times L.

    ``L (log((T - t + t_ref) / T) - weight (D - D_ref))`` with the layer's own seconds t and nats D:
    the environment's reward minus what it would be had this layer been served as in the reference.
    Its gradient in the layer's own seconds is that of the environment's reward. (A linear
    ``(t_ref - t) / T``, of mean ``T_ref / T - 1``, would pay for speed at any price far from the
    reference.) Requantisation and the guard of super experts belong to no layer. ``quality_weight``
    may be one per lane, [N].
    """
    seconds = outcome.decode_s[:, None]
    speed = np.log((seconds - outcome.layer_s + outcome.ref_layer_s) / seconds)
    error = (outcome.layer_error - outcome.ref_layer_error) / np.maximum(
        outcome.layer_energy, 1e-300
    )
    lost = quality.kappa * layer_weights(model) * error
    rewards: FloatArray = model.n_layers * (speed - np.asarray(quality_weight)[..., None] * lost)
    return rewards


def _expected(share: FloatArray, n_tokens: FloatArray, top_k: int) -> tuple[FloatArray, FloatArray]:
    """Tokens per step and probability of any, [N, L, E], if tokens choose independently."""
    chance = np.minimum(top_k * share, 1.0)
    n = n_tokens[:, None, None] * np.ones_like(chance)  # NumPy rounds x ** 2 otherwise if it is one
    return n * chance, 1 - (1 - chance) ** n
