"""Rows of a synthetic recording, drawn request by request in pieces of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.synthesize.profile import RoutingProfile
from ndp_gym.trace_content import id_dtype
from ndp_gym.trace_requests import Requests

_PIECE_VALUES = 2**20  # scores held at a time: 4 MB each array
_BLOCK = 16  # rows with one state of the drifting popularity
_LOOP_PERIODS = (2, 150)  # traces.md §5.8
_LOOP_JITTER = 0.02  # share of (row, layer) sets inside a loop that differ from the last round
_GATE_SPREAD = 0.3  # of the log of a row's sharpness: sd .1 of the first weight (traces.md §6)
_MODEL, _DOMAIN, _CONVERSATION, _REQUEST = range(4)  # streams of random numbers

Array32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Routed layers, experts per layer and experts per token."""

    n_layers: int
    n_experts: int
    top_k: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, high in (("n_layers", 1000), ("n_experts", 1000), ("top_k", self.n_experts)):
            value = getattr(self, name)
            if not 1 <= value <= high:
                raise ValueError(f"{name} must be in 1..{high}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of a recording: ids ``[n, L, K]`` best expert first, gates or None."""

    first_row: int
    expert_ids: npt.NDArray[Any]
    gate_weights: npt.NDArray[np.float16] | None


class Generator:
    """Draws the rows of requests; the same profile, shape and seed give the same rows.

    A request's rows depend on its number, conversation, domain and length only, not on the other
    requests.
    """

    def __init__(
        self, profile: RoutingProfile, shape: Shape, *, seed: int = 0, loops: float = 0.0
    ) -> None:
        """Draw what all requests share: popularity and loadings.

        Args:
            profile: Amplitudes.
            shape: Layers, experts and K.
            seed: Of every random number.
            loops: Share of the requests whose decode rows end in a loop.
        """
        if not 0 <= loops <= 1:
            raise ValueError(f"loops must be in 0..1, got {loops}")
        self.profile, self.shape, self.seed, self.loops = profile, shape, seed, loops
        self._scale = profile.by_layer("popularity", shape.n_layers)[:, None].astype(np.float32)
        fast = profile.by_layer("fast", shape.n_layers)
        self._amplitude = np.stack(
            [fast, np.full(len(fast), profile.slow), np.full(len(fast), profile.token)]
        ).astype(np.float32)
        rng = self._rng(_MODEL)
        self._shared = self._popularity(rng, profile.model_share)
        size = (shape.n_layers, profile.rank, shape.n_experts)
        loadings = rng.standard_normal(size, dtype=np.float32)
        self._loadings = loadings / np.linalg.norm(loadings, axis=1, keepdims=True)
        self._gates = None if profile.gates is None else _sharpness_base(profile.gates)

    def pieces(self, requests: Requests) -> Iterator[Piece]:
        """The rows of all requests in file order, in pieces of at most 4 MB of scores."""
        blocks = _PIECE_VALUES // (self.shape.n_layers * self.shape.n_experts * _BLOCK)
        step = _BLOCK * max(1, blocks)
        for index in range(len(requests)):
            start, length = int(requests.start[index]), int(requests.length[index])
            rng = self._rng(_REQUEST, index)
            bias = self._bias(int(requests.domain[index]), int(requests.conversation[index]))
            loop = self._loop(rng, int(requests.n_prompt[index]), length)
            state = rng.standard_normal((2, self.profile.rank), dtype=np.float32)
            drift = self._popularity(rng, self.profile.drift_share)
            tail: npt.NDArray[Any] | None = None
            for first in range(0, length, step):
                n = min(step, length - first)
                scores, state = self._scores(rng, state, n)
                for block in range(0, n, _BLOCK):
                    scores[:, block : block + _BLOCK] += (bias + drift)[:, None]
                    drift = self._drifted(rng, drift)
                ids = _best(scores, self.shape.top_k).transpose(1, 0, 2)
                if loop is not None:
                    ids, tail = _looped(rng, ids, first, *loop, tail)
                yield Piece(
                    first_row=start + first, expert_ids=ids, gate_weights=self._weights(rng, n)
                )

    def _rng(self, stream: int, index: int = 0) -> np.random.Generator:
        words = np.random.SeedSequence([self.seed, stream, index])
        return np.random.Generator(np.random.SFC64(words))

    def _popularity(self, rng: np.random.Generator, share: float) -> Array32:
        size = (self.shape.n_layers, self.shape.n_experts)
        draw = rng.standard_exponential(size, dtype=np.float32) - 1
        return np.asarray(self._scale * np.float32(share**0.5) * draw)

    def _bias(self, domain: int, conversation: int) -> Array32:
        shares = self.profile
        rest = 1 - shares.model_share - shares.domain_share - shares.drift_share
        of_domain = self._popularity(self._rng(_DOMAIN, domain), self.profile.domain_share)
        own = self._popularity(self._rng(_CONVERSATION, conversation), max(0.0, rest))
        return self._shared + of_domain + own

    def _drifted(self, rng: np.random.Generator, drift: Array32) -> Array32:
        keep = np.exp(-_BLOCK / self.profile.drift_rows)
        fresh = self._popularity(rng, self.profile.drift_share)
        return np.asarray(keep * drift + np.sqrt(1 - keep**2) * fresh, dtype=np.float32)

    def _scores(self, rng: np.random.Generator, state: Array32, n: int) -> tuple[Array32, Array32]:
        """Scores ``[L, n, E]`` without popularity, and the hidden state ``[2, rank]`` after."""
        constants = np.array([self.profile.fast_rows, self.profile.slow_rows])
        keep = np.exp(-1 / constants).astype(np.float32)[:, None]
        fresh = np.sqrt(1 - keep**2)
        drawn = rng.standard_normal((3, n, self.profile.rank), dtype=np.float32)
        for row in range(n):
            state = np.asarray(keep * state + fresh * drawn[:2, row], dtype=np.float32)
            drawn[:2, row] = state
        hidden = np.einsum("pl,pnd->lnd", self._amplitude, drawn, optimize=True)
        size = (self.shape.n_layers, n, self.shape.n_experts)
        scores = rng.standard_normal(size, dtype=np.float32)
        scores += np.matmul(hidden, self._loadings)
        return scores, state

    def _loop(self, rng: np.random.Generator, n_prompt: int, length: int) -> tuple[int, int] | None:
        """(First row, period) of the loop that ends the request, or None."""
        wanted, where = rng.random(2)
        low, high = _LOOP_PERIODS
        period = int(rng.integers(low, high + 1))
        begin = n_prompt + int(where * (length - n_prompt)) + 1
        period = min(period, begin)
        return (begin, period) if wanted < self.loops and period >= low else None

    def _weights(self, rng: np.random.Generator, n: int) -> npt.NDArray[np.float16] | None:
        if self._gates is None:
            return None
        size = (n, self.shape.n_layers, 1)
        sharpness = np.exp(np.float32(_GATE_SPREAD) * rng.standard_normal(size, dtype=np.float32))
        weights = np.exp(sharpness * np.log(self._gates).astype(np.float32))
        return np.asarray(weights / weights.sum(axis=2, keepdims=True), dtype=np.float16)


def _best(scores: Array32, top_k: int) -> npt.NDArray[Any]:
    """Ids of the ``top_k`` highest scores along the last axis, highest first."""
    n_experts = scores.shape[-1]
    np.negative(scores, out=scores)
    if top_k < n_experts:
        chosen = np.argpartition(scores, top_k - 1, axis=-1)[..., :top_k]
    else:
        chosen = np.broadcast_to(np.arange(n_experts), scores.shape)
    order = np.argsort(np.take_along_axis(scores, chosen, axis=-1), axis=-1)
    return np.take_along_axis(chosen, order, axis=-1).astype(id_dtype(n_experts))


def _looped(
    rng: np.random.Generator,
    ids: npt.NDArray[Any],
    first: int,
    begin: int,
    period: int,
    tail: npt.NDArray[Any] | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The rows with those from ``begin`` on repeating the ``period`` before, and the last rows."""
    known = ids if tail is None else np.concatenate([tail, ids])
    n_before = len(known) - len(ids)
    fresh = rng.random(ids.shape[:2]) < _LOOP_JITTER
    for row in range(max(0, begin - first), len(ids)):
        again = known[n_before + row - period]
        known[n_before + row] = np.where(fresh[row][:, None], ids[row], again)
    return known[n_before:].copy(), known[-period:].copy()


def _sharpness_base(gates: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """The weights whose powers, over the spread of sharpness, have the mean ``gates``."""
    target = np.maximum(np.array(gates), 1e-4)
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    powers = np.exp(_GATE_SPREAD * nodes)[:, None]
    base = target / target.sum()
    for _ in range(60):
        rows = base**powers
        mean = weights @ (rows / rows.sum(axis=1, keepdims=True)) / weights.sum()
        base = base * target / mean
        base /= base.sum()
    return np.asarray(base)
