"""Part b: routing that answers to the bits, beside the recorded routing that does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.rollout import Measurement, Task
from ndp_gym.statistics import ConversationBootstrap, percentile_interval
from ndp_gym.trace import RoutingTrace
from train.closed_loop import loop
from train.closed_loop.cache import Cache
from train.closed_loop.copies import FULL, Copies
from train.closed_loop.loop import Tokens

MAX_WINDOWS = 32
UNIFORM_BITS = (FULL, 4, 3, 2, 1)
SAME_ROUTING = {b: (f"all_far:bits={b}", f"ema:bits={b},far_bits={b}") for b in (4, 3, 2, 1)} | {
    FULL: (f"all_far:bits={FULL}",)
}
"""Policies that serve everything at one width always, so that one live run routes them all."""
MIXED = (
    "context_aware", "balance", "static_popularity:far_bits=2", "mc_moe", "ema:bits=3,far_bits=1",
    "balance:price=2", "ema:bits=2,far_bits=1", "mc_moe:bits=1.5", "all_hbm_mixed",
    "mc_moe:bits=1.25",
)  # fmt: skip
FloatArray = NDArray[np.float64]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a row shows of a run."""

    tokens_per_s: float
    hit_rate: float
    predicted_nats: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One policy with recorded routing and with routing of its own.

    Attributes:
        policy: its name.
        mean_bits: of the copies that served, recorded routing.
        open: on recorded routing.
        forced, free: the model routes, reading the recorded answers or its own.
        forced_changed, free_changed: shares of (token, layer) sets and of expert choices that
            differ from the recording.
        true_nats: measured ΔNLL on the recorded answers, and its standard error.
        speed_interval: 95 % half width of the open row's tokens per second over all test
            requests, relative.
        free_interval: the same scaled to as few requests as were run live.
    """

    policy: str
    mean_bits: float
    open: Speed
    forced: Speed
    free: Speed
    forced_changed: tuple[float, float]
    free_changed: tuple[float, float]
    true_nats: tuple[float, float]
    speed_interval: float
    free_interval: float

    @property
    def speed_error(self) -> float:
        """Recorded over live tokens per second, less one."""
        return self.open.tokens_per_s / self.forced.tokens_per_s - 1

    @property
    def free_speed_error(self) -> float:
        """The same with its own answers."""
        return self.open.tokens_per_s / self.free.tokens_per_s - 1

    @property
    def hit_error(self) -> float:
        """Recorded less live hit rate."""
        return self.open.hit_rate - self.forced.hit_rate

    @property
    def free_hit_error(self) -> float:
        """The same with its own answers."""
        return self.open.hit_rate - self.free.hit_rate


def speed_of(measured: Measurement) -> Speed:
    """Of all tokens of a run."""
    total, tokens = measured.totals, float(measured.tokens.sum())
    return Speed(
        tokens_per_s=tokens / float(measured.seconds.sum()),
        hit_rate=total["hits"] / total["routed"],
        predicted_nats=float(measured.loss.sum()) / tokens,
    )


def mean_bits(measured: Measurement, task: Task) -> float:
    """Width that served, averaged over routed tokens."""
    served = measured.served.sum(axis=0)
    return float(served @ np.asarray(task.system.stored_bits) / served.sum())


class Study:
    """Live runs over one task, shared by the policies that are routed alike, kept on disk."""

    def __init__(
        self, task: Task, copies: Copies, texts: dict[int, Tokens], cache: Cache, report: Report
    ) -> None:
        """Study the first `MAX_WINDOWS` windows of ``task``."""
        self.whole, self.task = task, replace(task, max_windows=MAX_WINDOWS)
        self._copies, self._texts, self._cache, self._report = copies, texts, cache, report
        _, self._base, self._tokens = self.live(f"all_far:bits={FULL}", forced=True)

    def live(self, policy: str, *, forced: bool) -> tuple[RoutingTrace, FloatArray, FloatArray]:
        """Routing under the bits of a policy; loss and predicted tokens by request."""
        trace = loop.writable(self.task.trace)
        assert trace.gate_weights is not None

        def run() -> dict[str, NDArray[Any]]:
            self._report(f"{policy} decodes, fed {'the recorded' if forced else 'its own'} answers")
            done = loop.run(policy, self.task, self._copies, self._texts, forced=forced)
            gates = done.trace.gate_weights
            assert gates is not None
            answered = {"nats": done.nats, "tokens": done.n_tokens.astype(np.float64)}
            return {"ids": done.trace.expert_ids, "gates": gates, **answered}

        key = ("live", policy, forced, MAX_WINDOWS, self.task.trace.sha256)
        made = self._cache.get_all(key, run)
        trace.expert_ids[:], trace.gate_weights[:] = made["ids"], made["gates"]
        return trace, made["nats"], made["tokens"]

    def compare(self) -> list[Loop]:
        """All policies, uniform ones first."""
        rows = []
        for bits in UNIFORM_BITS:
            rows += self._compare(SAME_ROUTING[bits])
        for policy in MIXED:
            rows += self._compare((policy,))
        return rows

    def _compare(self, policies: Sequence[str]) -> list[Loop]:
        forced, nats, _ = self.live(policies[0], forced=True)
        free, _, _ = self.live(policies[0], forced=False)
        return [self._row(policy, forced, free, nats) for policy in policies]

    def _row(self, policy: str, forced: RoutingTrace, free: RoutingTrace, nats: FloatArray) -> Loop:
        recorded = loop.run(policy, self.task)
        replays = [loop.run(policy, replace(self.task, trace=trace)) for trace in (forced, free)]
        measured = loop.run(policy, self.whole).measured
        resampled = ConversationBootstrap(
            n_conversations=len(measured.tokens), block_size=self.whole.batch_size
        )
        low, high = percentile_interval(resampled.ratios(measured.tokens, measured.seconds))
        width = (high - low) / 2 / speed_of(measured).tokens_per_s
        n_live = int((recorded.measured.tokens > 0).sum())
        speeds = [speed_of(r.measured) for r in (recorded, *replays)]
        changed = [loop.changed(r, self.task.trace) for r in replays]
        return Loop(
            policy=policy,
            mean_bits=mean_bits(recorded.measured, self.task),
            open=speeds[0],
            forced=speeds[1],
            free=speeds[2],
            forced_changed=changed[0],
            free_changed=changed[1],
            true_nats=self._true(nats),
            speed_interval=width,
            free_interval=width * math.sqrt(len(measured.tokens) / n_live),
        )

    def _true(self, nats: FloatArray) -> tuple[float, float]:
        """ΔNLL of the recorded answers, and its standard error by request."""
        answered = self._tokens > 0
        lost, tokens = (nats - self._base)[answered], self._tokens[answered]
        resampled = ConversationBootstrap(n_conversations=int(answered.sum()))
        return float(lost.sum() / tokens.sum()), float(resampled.ratios(lost, tokens).std())
