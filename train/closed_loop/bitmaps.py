"""Part a: the measured loss of bit maps, beside what the quality model predicts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ndp_gym.quality import QualityModel, delta_nll, layer_weights
from ndp_gym.rollout import Task
from ndp_gym.specs import Format, MoESpec
from ndp_gym.statistics import ConversationBootstrap
from ndp_gym.trace import RoutingTrace
from train.closed_loop import loop
from train.closed_loop.cache import Cache
from train.closed_loop.copies import FULL, WIDTHS, BitMap, Copies, Texts, loss
from train.closed_loop.maps import Map

N_TOKENS = 128  # of each prompt, the shortest has as many
NOISE_SIZE, NOISE_SEEDS = 0.1, (0, 1)  # relative squared size, about what 2 bits lose
SHORT_RUN = 8  # windows
POLICIES = (
    "balance", "balance:price=0.25", "balance:price=0.5", "balance:price=2", "oracle_balance",
    "mc_moe", "mc_moe:bits=1.5", "mc_moe:bits=2", "mc_moe:bits=1.75", "mc_moe:bits=2.25",
    "context_aware", "context_aware:bits=2", "context_aware:bits=2.5", "context_aware:bits=3.5",
    "context_aware:bits=1.5", "ema:far_bits=3", "ema:far_bits=2", "ema:bits=3,far_bits=2",
    "ema:bits=3,far_bits=1", "ema:bits=16,far_bits=3", "prefill_topk:far_bits=2",
    "prefill_topk:bits=3,far_bits=2", "static_popularity:far_bits=2",
    "static_popularity:bits=3,far_bits=1", "oracle_hot:far_bits=2", "random:far_bits=2",
    "all_hbm_mixed",
)  # fmt: skip
FloatArray = NDArray[np.float64]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivity:
    """What quantizing one layer alone costs on train prompts.

    Attributes:
        noise: [L] nats per relative squared error of Gaussian noise on its experts.
        widths: [L, NB] nats with all its experts at a width of `WIDTHS`.
    """

    noise: FloatArray
    widths: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Maps with their losses.

    Attributes:
        maps: all of them.
        nats: [M] mean ΔNLL per token, against 16 bits everywhere.
        errors: [M] its standard error, by bootstrap over texts.
        first_text: [M] the same of the first text alone.
        base: nats per token at 16 bits.
        n_texts, n_tokens: what they were measured on.
        predicted: [M] per way to predict, before scaling.
    """

    maps: tuple[Map, ...]
    nats: FloatArray
    errors: FloatArray
    first_text: FloatArray
    base: float
    n_texts: int
    n_tokens: int
    predicted: Mapping[str, FloatArray]


def policy_maps(task: Task, cache: Cache, report: Report) -> Iterator[Map]:
    """The width that served each expert most, in a short run and over all windows."""
    for windows in (SHORT_RUN, None):
        report(f"maps of {len(POLICIES)} policies, {windows or 'all'} windows")
        for policy in POLICIES:
            run = partial(loop.run, policy, replace(task, max_windows=windows))
            key = ("served", policy, windows, task.trace.sha256, task.system.name)
            bits = cache.get(key, lambda run=run: run().most_served)
            yield Map(stratum="policies", kind=policy, bits=bits)


def energy(trace: RoutingTrace, requests: NDArray[np.int64], n_rows: int) -> FloatArray:
    """[L, E] squared gates over the first rows of ``requests``."""
    total = np.zeros((trace.n_layers, trace.n_experts))
    for first in trace.requests.start[requests].tolist():
        ids, gates = trace.window(first, n_rows)
        assert gates is not None
        for layer in range(trace.n_layers):
            weight = np.square(gates[:, layer].astype(np.float64)).ravel()
            total[layer] += np.bincount(ids[:, layer].ravel(), weight, trace.n_experts)
    return total


class Losses:
    """Losses of one set of texts under whatever copies serve."""

    def __init__(self, copies: Copies, texts: Texts, cache: Cache) -> None:
        """Measure 16 bits first."""
        self.copies, self._texts, self._cache = copies, texts, cache
        self._key = np.concatenate(texts)
        self.tokens = np.array([len(t) - 1 for t in texts])
        self.base = self.of(np.full(copies.shape, FULL, np.uint8))

    def of(self, bits: BitMap) -> FloatArray:
        """[D] nats of every text with the copies of a bit map."""

        def measure() -> FloatArray:
            self.copies.serve(bits)
            return loss(self.copies.model, self._texts).nats

        return self._cache.get(("loss", self._key, bits), measure)

    def with_noise(self, layer: int, seed: int) -> FloatArray:
        """[D] nats of every text with noise on one layer, all at 16 bits."""

        def measure() -> FloatArray:
            self.copies.clean()
            self.copies.add_noise(layer, NOISE_SIZE, seed)
            nats = loss(self.copies.model, self._texts).nats
            self.copies.clean()
            return nats

        return self._cache.get(("noise", self._key, layer, NOISE_SIZE, seed), measure)

    def delta(self, nats: FloatArray) -> float:
        """Nats per token above 16 bits."""
        return float((nats - self.base).sum() / self.tokens.sum())

    def standard_error(self, nats: FloatArray) -> float:
        """Of `delta`, by bootstrap over texts."""
        resampled = ConversationBootstrap(n_conversations=len(nats))
        return float(resampled.ratios(nats - self.base, self.tokens).std())


def sensitivity(losses: Losses, report: Report) -> Sensitivity:
    """Quantize, and disturb, one layer after the other."""
    n_layers = losses.copies.shape[0]
    noise, widths = np.zeros(n_layers), np.zeros((n_layers, len(WIDTHS)))
    for layer in range(n_layers):
        report(f"sensitivity of layer {layer + 1}/{n_layers}")
        disturbed = [losses.delta(losses.with_noise(layer, seed)) for seed in NOISE_SEEDS]
        noise[layer] = np.mean(disturbed) / NOISE_SIZE
        for column, width in enumerate(WIDTHS[1:], 1):
            bits = np.full(losses.copies.shape, FULL, np.uint8)
            bits[layer] = width
            widths[layer, column] = losses.delta(losses.of(bits))
    return Sensitivity(noise=noise, widths=widths)


Way = tuple[MoESpec, QualityModel, FloatArray]
"""Layer weights, table of errors as in `WIDTHS`, and share of work [L, E]."""


def predictors(
    model: MoESpec,
    form: Format,
    errors: FloatArray,
    found: Sensitivity,
    share: FloatArray,
    train_share: FloatArray,
) -> dict[str, Way]:
    """Ways to fill the same quality model, the default first.

    ``errors`` [L, E, NB] are measured on the weights, ``share`` is the recorded gate energy of the
    texts, ``train_share`` that of the train prompts.
    """
    gaussian = np.broadcast_to([form.rel_mse[b] for b in WIDTHS], errors.shape)
    flat = replace(model, layer_weights=(1.0,) * model.n_layers)
    by_noise = replace(model, layer_weights=tuple(np.maximum(found.noise, 0.0).tolist()))
    kappa = QualityModel.kappa
    own = np.maximum(found.widths, 0.0) / (kappa * layer_weights(model)[:, None])
    by_width = QualityModel(table=np.broadcast_to(own[:, None], errors.shape))
    assumed, exact = QualityModel(table=gaussian), QualityModel(table=errors)
    return {
        DEFAULT: (model, assumed, share),
        "popularity of train prompts": (model, assumed, train_share),
        "measured eps": (model, exact, share),
        "flat layers": (flat, assumed, share),
        "layers by noise": (by_noise, assumed, share),
        BEST: (model, by_width, share),
    }


DEFAULT, BEST = "default", "layers by width"


def predict(bits: BitMap, way: Way) -> float:
    """ΔNLL of a bit map."""
    model, quality, share = way
    assert quality.table is not None
    column = np.array([WIDTHS.index(b) for b in bits.ravel()]).reshape(bits.shape)
    error = np.take_along_axis(quality.table, column[..., None], axis=2)[..., 0]
    lost = (share * error).sum(axis=1)
    return float(delta_nll(model, lost, share.sum(axis=1), quality=quality))


def measure(
    losses: Losses,
    candidates: Sequence[Map],
    ways: Mapping[str, Way],
    report: Report,
) -> Measured:
    """Measure every distinct map, predict it in all ``ways``."""
    first: dict[bytes, Map] = {}
    for candidate in candidates:
        first.setdefault(candidate.bits.tobytes(), candidate)
    distinct = tuple(first.values())
    nats = []
    for n, candidate in enumerate(distinct):
        if n % 10 == 0:
            report(f"bit map {n + 1}/{len(distinct)}")
        nats.append(losses.of(candidate.bits))
    return Measured(
        maps=distinct,
        nats=np.array([losses.delta(n) for n in nats]),
        errors=np.array([losses.standard_error(n) for n in nats]),
        first_text=np.array([(n - losses.base)[0] / losses.tokens[0] for n in nats]),
        base=float(losses.base.sum() / losses.tokens.sum()),
        n_texts=len(losses.tokens),
        n_tokens=int(losses.tokens.sum()),
        predicted={
            name: np.array([predict(m.bits, way) for m in distinct]) for name, way in ways.items()
        },
    )
