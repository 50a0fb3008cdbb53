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
_SLOW_BLOCK = 4  # rows with one state of the slow part
_BLOCK = 16  # rows with one state of the drifting popularity
_LOOP_PERIODS = (2, 150)  # rows, as in the greedy recordings of grouped-nf4-gemm
_LOOP_JITTER = 0.02  # share of (row, layer) sets inside a loop that differ from the last round
_GATE_SPREAD = 0.3  # of the log of a row's sharpness: sd .1 of the first weight (Gemma-4)
_GOLDEN = (5**0.5 - 1) / 2
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
        fast = np.minimum(profile.by_layer("fast", shape.n_layers), 1 - profile.slow)
        slow = np.full(shape.n_layers, profile.slow)
        shares = np.stack([fast, slow, np.maximum(0, 1 - fast - slow)])
        self._amplitude = np.sqrt(shares).astype(np.float32)
        rng = self._rng(_MODEL)
        self._shared = self._popularity(rng, profile.model_share)
        size = (shape.n_layers, profile.rank, shape.n_experts)
        loadings = rng.standard_normal(size, dtype=np.float32)
        loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
        self._loadings = np.float32(profile.coupling**0.5) * loadings
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
            hidden = _Fading(self.profile, rng, (1, self.profile.rank))
            own = _Fading(self.profile, rng, (self.shape.n_layers, self.shape.n_experts))
            steep = self._steepness(int(requests.domain[index]))
            drift = self._popularity(rng, self.profile.drift_share)
            prompt, answer = (self._popularity(rng, self.profile.prompt_share) for _ in range(2))
            tail: npt.NDArray[Any] | None = None
            for first in range(0, length, step):
                n = min(step, length - first)
                scores = self._scores(hidden.rows(n), own.rows(n))
                for block in range(0, n, _BLOCK):
                    scores[block : block + _BLOCK] += steep * (bias + drift)
                    drift = self._drifted(rng, drift)
                of_prompt = max(0, int(requests.n_prompt[index]) - first)
                scores[:of_prompt] += steep * prompt
                scores[of_prompt:] += steep * answer
                ids = _best(scores, self.shape.top_k)
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
        cold = np.float32(self.profile.cold)
        draw = rng.standard_exponential(size, dtype=np.float32) - 1
        draw -= cold * (rng.standard_exponential(size, dtype=np.float32) - 1)
        return np.asarray(self._scale * np.float32((share / (1 + cold**2)) ** 0.5) * draw)

    def _bias(self, domain: int, conversation: int) -> Array32:
        shares = self.profile
        within = shares.drift_share + shares.prompt_share
        rest = 1 - shares.model_share - shares.domain_share - within
        of_domain = self._popularity(self._rng(_DOMAIN, domain), self.profile.domain_share)
        own = self._popularity(self._rng(_CONVERSATION, conversation), max(0.0, rest))
        return self._shared + of_domain + own

    def _steepness(self, domain: int) -> np.float32:
        """Factor of a domain's popularity; evenly spread over domains, of mean log 0."""
        place = (domain + 0.5) * _GOLDEN % 1
        return np.float32(np.exp(self.profile.domain_spread * 12**0.5 * (place - 0.5)))

    def _drifted(self, rng: np.random.Generator, drift: Array32) -> Array32:
        keep = np.exp(-_BLOCK / self.profile.drift_rows)
        fresh = self._popularity(rng, self.profile.drift_share)
        return np.asarray(keep * drift + np.sqrt(1 - keep**2) * fresh, dtype=np.float32)

    def _scores(self, hidden: Array32, own: Array32) -> Array32:
        """Scores ``[n, L, E]`` of unit variance, without popularity.

        Args:
            hidden: Fast, slow and fresh part of the hidden state ``[3, n, 1, rank]``.
            own: The same of every expert's own ``[3, n, L, E]``; overwritten.
        """
        own *= np.float32((1 - self.profile.coupling) ** 0.5) * self._amplitude[:, None, :, None]
        scores: Array32 = own[0]
        scores += own[1]
        scores += own[2]
        mixed = np.einsum("pl,pnd->lnd", self._amplitude, hidden[:, :, 0], optimize=True)
        scores += np.matmul(mixed, self._loadings).transpose(1, 0, 2)
        return scores

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


class _Fading:
    """Parts of a random state that fade fast, slowly and at once, each of unit variance."""

    def __init__(
        self, profile: RoutingProfile, rng: np.random.Generator, shape: tuple[int, int]
    ) -> None:
        constants = np.array([profile.fast_rows, profile.slow_rows / _SLOW_BLOCK])
        self._keep = np.exp(-1 / constants).astype(np.float32)
        self._fresh = np.sqrt(1 - self._keep**2)
        self._rng, self._shape = rng, shape
        self._state = rng.standard_normal((2, *shape), dtype=np.float32)

    def rows(self, n: int) -> Array32:
        """The next ``n`` rows of the three parts ``[3, n, *shape]``; the slow one in steps."""
        parts = np.empty((3, n, *self._shape), dtype=np.float32)
        self._rng.standard_normal(out=parts[0], dtype=np.float32)
        self._rng.standard_normal(out=parts[2], dtype=np.float32)
        fast, slow = self._state
        for row in range(n):
            fast *= self._keep[0]
            parts[0, row] *= self._fresh[0]
            fast += parts[0, row]
            parts[0, row] = fast
            if row % _SLOW_BLOCK == 0:
                slow *= self._keep[1]
                drawn = self._rng.standard_normal(self._shape, dtype=np.float32)
                slow += self._fresh[1] * drawn
            parts[1, row] = slow
        return parts


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
