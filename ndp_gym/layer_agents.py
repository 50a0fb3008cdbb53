"""Layer agents: every routed layer decides for itself, and all share one policy.

An agent sees dimensionless features of its layer and answers with four numbers in [-1, 1]; a
compiled decoder (`ndp_gym.layer_loops`) turns the answers of all layers into one plan that keeps
the HBM budget. Nothing depends on the number of layers or experts, so an agent trained on one model
runs on any. Formulation of ``learning.md`` section 2, with widths in HBM priced per byte and HBM
rationed by layer: where layers compete for bytes, each pays for them with the others' speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndp_gym.batch import over_lanes
from ndp_gym.lanes import Observations
from ndp_gym.layer_facts import LaneFacts
from ndp_gym.layer_features import FEATURES, Estimate, features_of, outside_s
from ndp_gym.layer_forecast import LaneForecaster, Routing, entry
from ndp_gym.outcome import Outcome
from ndp_gym.plan import HBM
from ndp_gym.planners import Facts, facts_of
from ndp_gym.quality import QualityModel, layer_weights
from ndp_gym.specs import MoESpec, SystemSpec

__all__ = ["ACTIONS", "Decided", "LayerAgents", "layer_rewards"]

FloatArray = NDArray[np.float64]

ACTIONS = ("far_value", "price", "hysteresis", "mix")
"""What the four numbers steer; at 0 the decoder weighs things as `balance` does by default.

``far_value``: seconds of the far device count ``2 ** a``-fold when experts are chosen for HBM;
``price``: seconds against quality, ``2 ** a``; ``hysteresis``: seconds of copies, ``16 ** a``;
``mix``: expected routing, -1 the prompts, 0 the usual blend, 1 the last windows.
"""


class Decided(NamedTuple):
    """Plans of N lanes: tier, bits and migration order, [N, L, E] each."""

    tier: NDArray[np.uint8]
    bits: NDArray[np.uint8]
    order: FloatArray


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

    Raises:
        ValueError: a feature does not exist.
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
    ) -> None:
        """Read the nominal costs; every lane then waits for `reset`."""
        unknown = sorted(features.keys() - FEATURES.keys())
        if unknown:
            raise ValueError(f"layer agents have no features {unknown}; they have {list(FEATURES)}")
        self.features = dict(features)
        self._shape = (model.n_layers, model.n_experts)
        self._top_k, self._window = model.top_k, window
        self._told = system, quality_weight
        self._model, self._quality = model, quality
        self._facts = LaneFacts(self._facts_of(*self._told), n_lanes)
        self._lane_told = [self._told] * n_lanes
        self._weights = layer_weights(model)
        self._forecaster = LaneForecaster(n_lanes, self._shape, profile)
        self._wanted = np.zeros((n_lanes, *self._shape), np.int64)
        self._has_plan = np.zeros(n_lanes)
        self._loops = import_module("ndp_gym.layer_loops")  # numba comes with it
        self._seen: tuple[Observations, Routing, Estimate, FloatArray] | None = None

    def _facts_of(self, system: SystemSpec, quality_weight: float) -> Facts:
        return facts_of(self._model, system, self._quality, quality_weight, self._window)

    def reset(
        self, lane: int, system: SystemSpec | None = None, quality_weight: float | None = None
    ) -> None:
        """Start one lane's episode, with other nominal facts than at construction if given."""
        usual, weight = self._told
        told = system or usual, weight if quality_weight is None else quality_weight
        if told != self._lane_told[lane]:
            self._facts.put(lane, self._facts_of(*told))
            self._lane_told[lane] = told
        self._forecaster.reset(lane)
        self._wanted[lane] = 0
        self._has_plan[lane] = 0

    def observe(
        self, observations: Observations, only: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """[N, L, F] scaled features from observations [N, ...], clipped to [-5, 5].

        Call it once per window. Where some lanes have been reset since, a second call names
        ``only`` those, so that the others do not count their last window twice.
        """
        routing = self._forecaster(observations, only)
        share = self._forecaster.mixed(routing, np.zeros(routing.base.shape[:2]))
        estimate = self._estimate(observations, share)
        self._seen = observations, routing, estimate, share
        columns = features_of(observations, routing, estimate, self._facts, self._weights)
        scaled = np.empty((*routing.base.shape[:2], len(self.features)))
        for i, name in enumerate(self.features):
            scaled[..., i] = columns[name]
        offsets, scales = np.array(list(self.features.values())).T
        seen: NDArray[np.float32] = ((scaled - offsets) / scales).clip(-5, 5).astype(np.float32)
        return seen

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
        context = self._seen[0]["context"]
        budgets = np.floor(entry(context, "hbm_budget_bytes"))[:, None]
        clipped: FloatArray = np.asarray(actions, np.float64).clip(-1, 1)
        _, rations = self._decoded(None, budgets)
        rations[:, 0] += budgets[:, 0] - rations.sum(axis=1)
        decided, _ = self._decoded(clipped, rations)
        self.ordered(decided.tier, decided.bits)
        return decided

    def ordered(self, tier: NDArray[np.integer], bits: NDArray[np.integer]) -> None:
        """Note the plans [N, L, E] that run, where they are not those of the last `decide`."""
        self._wanted = np.where(tier == HBM, bits, 0).astype(np.int64)
        self._has_plan.fill(1)

    def _decoded(
        self, actions: FloatArray | None, rations: FloatArray
    ) -> tuple[Decided, FloatArray]:
        """Plans, and the HBM bytes [N, L] that they are charged; ``None`` is an action of 0."""
        assert self._seen is not None
        observations, routing, estimate, share = self._seen
        facts, load, active = self._facts, estimate.load, estimate.active
        if actions is None:
            actions = np.zeros((*share.shape[:2], len(ACTIONS)))
        else:
            share = self._forecaster.mixed(routing, actions[..., ACTIONS.index("mix")])
            load, active = _expected(share, estimate.n_tokens, self._top_k)
        energy = 0.5 * routing.gates + 0.5 * share
        lost = facts.loss * energy[..., None] + facts.guard
        is_near = observations["tier"] == HBM
        present = np.where(is_near, observations["bitwidth"], 0).astype(np.int64)
        shape = present.shape
        decided = Decided(np.empty(shape, np.uint8), np.empty(shape, np.uint8), np.empty(shape))
        used = np.empty(shape[:2])
        arguments = (
            actions, (load, active, estimate.n_tokens), (present, self._wanted), rations,
            (1 / estimate.step_s, lost, self._has_plan), self._table(), facts.shared.in_place,
            *decided, used,
        )  # fmt: skip
        over_lanes(
            len(present), lambda _, first, last: self._loops.decide((first, last), *arguments)
        )
        return decided, used

    def _table(self) -> tuple[object, ...]:
        """Nominal costs as `ndp_gym.layer_loops.decide` reads them."""
        facts, table = self._facts, self._facts.shared.table
        of_lanes = (
            facts.gpu_token_s, facts.link_latency_s, facts.activation_token_s, facts.far_floor_s,
        )  # fmt: skip
        shared = float(table.far_min_tokens), float(self._window), float(self._top_k)
        return (
            table.bits, table.weight_bytes.astype(np.float64), table.index_of, facts.gpu_weight_s,
            facts.gpu_launch_s, facts.far_weight_s, facts.copy_s, facts.far_token_s, of_lanes,
            shared,
        )  # fmt: skip

    def _estimate(self, observations: Observations, share: FloatArray) -> Estimate:
        """Nominal seconds of a decode step for the expected routing, and what was measured."""
        facts, context = self._facts, observations["context"]
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
        if not facts.shared.in_place:
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
    Its gradient in the layer's own seconds is that of the environment's reward. (``learning.md``
    has ``(t_ref - t) / T``; far from the reference its mean, ``T_ref / T - 1``, pays for speed at
    any price.) Requantisation and the guard of super experts belong to no layer. ``quality_weight``
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
