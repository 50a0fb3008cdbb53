"""The simulator with a live model behind it: the copies that serve decide the routing they get.

`LiveLanes` walks through each window step by step before it advances: it asks a second simulator
which copy of every expert serves in the step, lets the model decode with these copies, and writes
the routing into the recording that the window then replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from ndp_gym import policy_calls
from ndp_gym.batch import Simulator
from ndp_gym.lanes import Lanes
from ndp_gym.outcome import Outcome
from ndp_gym.plan import FAR, HBM
from ndp_gym.policy import resolve
from ndp_gym.rollout import Measurement, Task, run_policy
from ndp_gym.specs import Service
from ndp_gym.trace import RoutingTrace
from traces.record.generate import Sampling, sample
from train.closed_loop.copies import FULL, BitMap, Copies
from train.closed_loop.decode import Decoder, sampling_noise

Tokens = NDArray[np.int64]


class LiveModel:
    """Decodes the requests of a run with the copies it is given, and notes the loss.

    Attributes:
        nats, n_tokens: [R] summed loss of the recorded answers and tokens predicted, by request;
            zero without ``forced``.
    """

    def __init__(
        self, trace: RoutingTrace, copies: Copies, texts: dict[int, Tokens], *, forced: bool
    ) -> None:
        """Answer the requests of ``trace``, whose tokens [S] are ``texts``.

        ``forced`` feeds the recorded answer; otherwise the model reads its own, sampled with the
        random numbers of the recording.
        """
        self._copies, self._texts, self._forced = copies, texts, forced
        self._requests = trace.requests
        self._sampling = Sampling(**trace.metadata.extra["sampling"])
        self._noise = sampling_noise(trace)
        self._decoder: Decoder | None = None
        n = len(trace.requests)
        self.nats, self.n_tokens = np.zeros(n), np.zeros(n, np.int64)

    def admit(self, slot: int, request: int, n_slots: int, bits: BitMap) -> None:
        """Put a request into a slot, its prompt run through the copies of ``bits``."""
        if self._decoder is None:
            self._decoder = Decoder(self._copies.model, n_slots, int(self._requests.length.max()))
            self._next = np.zeros(n_slots, np.int64)
        self._copies.serve(bits)
        n_prompt = int(self._requests.n_prompt[request])
        logits = self._decoder.prefill(slot, self._texts[request][:n_prompt])
        self._choose(slot, request, n_prompt, logits)

    def step(
        self, slots: NDArray[np.int64], requests: NDArray[np.int64], bits: BitMap
    ) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """One token of each slot -> ids and gates [n, L, K] of its row."""
        assert self._decoder is not None
        self._copies.serve(bits)
        done = self._decoder.step(slots, self._next[slots])
        for row, (slot, request) in enumerate(zip(slots.tolist(), requests.tolist(), strict=True)):
            place = int(self._decoder.length[slot])
            if place < self._requests.length[request]:
                self._choose(slot, request, place, done.logits[row])
        return done.expert_ids, done.gates

    def _choose(self, slot: int, request: int, place: int, logits: torch.Tensor) -> None:
        """The token at ``place`` of a request, fed to its slot in the next step."""
        if not self._forced:
            self._next[slot] = sample(logits, self._sampling, self._noise[request])
            return
        token = int(self._texts[request][place])
        self.nats[request] -= float(logits.double().log_softmax(-1)[token])
        self.n_tokens[request] += 1
        self._next[slot] = token


class LiveLanes(Lanes):
    """One lane whose windows are routed by a model, or as recorded where there is none.

    Attributes:
        served: [L, E, 17] decode steps in which each width served.
        visited: [T] rows that were decoded.
    """

    def __init__(self, task: Task, live: LiveModel | None) -> None:
        """A fresh lane of ``task``, whose recording is written to if there is a model."""
        names = ("batch_size", "window", "hbm_budget", "scheduling", "quality", "quality_weight")
        arguments = {name: getattr(task, name) for name in names}
        super().__init__(task.trace, task.model, task.system, **arguments)
        self._live = live
        self._held = np.full(self.batch_size, -1)
        self._ahead = Simulator(self.model, self.system, task.quality, n_lanes=1)
        self.served = np.zeros((*self.shape, FULL + 1), np.int64)
        self.visited = np.zeros(self.trace.n_rows, np.bool_)

    def advance(
        self,
        tier: NDArray[np.uint8],
        bits: NDArray[np.uint8],
        order: NDArray[np.float64] | None = None,
        services: Sequence[Service] | None = None,
    ) -> Outcome:
        """Route the window as its copies serve it, then replay it.

        Raises:
            RuntimeError: the steps one by one end in another state than the whole window.
        """
        order = self.default_order() if order is None else order
        self._route(tier, bits, order, services or self._services)
        outcome = super().advance(tier, bits, order, services)
        for name in ("hbm", "far", "target"):
            state, ahead = self.simulator.state, self._ahead.state
            if not np.array_equal(getattr(state, name), getattr(ahead, name)):
                raise RuntimeError(f"steps and window disagree in what {name} holds")
        return outcome

    def _route(
        self,
        tier: NDArray[np.uint8],
        bits: NDArray[np.uint8],
        order: NDArray[np.float64],
        services: Sequence[Service],
    ) -> None:
        schedule, ahead = self.schedule, self._ahead
        ahead.put_state(0, self.simulator.get_state(0))
        n_rows, first, context = schedule.n_rows(), schedule.row.copy(), schedule.context.copy()

        def step(tier: NDArray[np.uint8], at: int, live: NDArray[np.bool_]) -> None:
            windows = self._recording._replace(
                first_row=first + at, n_rows=live.astype(np.int64), context=context + at
            )
            ahead.advance(
                tier=tier, bits=bits, order=order, services=services, windows=windows, length=1,
                budgets=self.budgets(),
            )  # fmt: skip

        step(tier, 0, np.zeros_like(n_rows, np.bool_))  # applies the plan, moves nothing
        kept = np.where(ahead.state.target.reshape(tier.shape) == 0, FAR, HBM).astype(np.uint8)
        for at in range(int(n_rows.max())):
            live, state = n_rows > at, ahead.state
            serving = np.where(state.hbm[0] > 0, state.hbm[0], state.far[0]).reshape(self.shape)
            self._decode(np.flatnonzero(live[0]), first[0] + at, serving)
            step(kept, at, live)

    def _decode(self, slots: NDArray[np.int64], row: NDArray[np.int64], serving: BitMap) -> None:
        """Let the live slots [n] decode their next rows with the copies ``serving`` [L, E]."""
        self.served += serving[..., None] == np.arange(FULL + 1)
        self.visited[row[slots]] = True
        if self._live is None:
            return
        requests = self.schedule.request[0]
        for slot in np.flatnonzero((requests != self._held) & (requests >= 0)).tolist():
            self._live.admit(slot, int(requests[slot]), self.batch_size, serving)
        self._held = requests.copy()
        ids, gates = self._live.step(slots, requests[slots], serving)
        assert self.trace.gate_weights is not None
        self.trace.expert_ids[row[slots]] = ids
        self.trace.gate_weights[row[slots]] = gates


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveTask(Task):
    """A task that keeps the lane it makes; ``live`` routes it."""

    live: LiveModel | None = None
    made: list[LiveLanes] = field(default_factory=list)

    def start(self) -> tuple[LiveLanes, Tokens]:
        """A fresh lane, also the last of ``made``, and the requests in its order."""
        self.made.append(LiveLanes(self, self.live))
        order = self.trace.split_requests(self.split)
        self.made[-1].reset(0, order)
        return self.made[-1], order


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One policy, run once.

    Attributes:
        policy: as it is named on the command line.
        measured: what the simulator summed.
        trace: the recording as it was replayed.
        visited: [T] rows decoded.
        served: [L, E, 17] decode steps by width that served.
        nats, n_tokens: [R] loss on the recorded answers, zero where nothing was predicted.
    """

    policy: str
    measured: Measurement
    trace: RoutingTrace
    visited: NDArray[np.bool_]
    served: NDArray[np.int64]
    nats: NDArray[np.float64]
    n_tokens: NDArray[np.int64]

    @property
    def most_served(self) -> BitMap:
        """[L, E] width that served each expert in most steps."""
        return self.served.argmax(axis=2).astype(np.uint8)


def run(
    policy: str,
    task: Task,
    copies: Copies | None = None,
    texts: dict[int, Tokens] | None = None,
    *,
    forced: bool = True,
) -> Run:
    """Run a policy on recorded routing, or with the model ``copies`` where one is given.

    ``texts`` are the tokens of the task's requests, see `LiveModel`.
    """
    trace = writable(task.trace)
    live = None
    if copies is not None:
        assert texts is not None
        live = LiveModel(trace, copies, texts, forced=forced)
    values = {f.name: getattr(task, f.name) for f in fields(Task)}
    own = LiveTask(**{**values, "trace": trace}, live=live)
    made = policy_calls.make(policy, resolve(policy))
    measured = run_policy(made, own, seed=0, name=policy)
    lane, n = own.made[-1], len(trace.requests)
    return Run(
        policy=policy,
        measured=measured,
        trace=trace,
        visited=lane.visited,
        served=lane.served,
        nats=np.zeros(n) if live is None else live.nats,
        n_tokens=np.zeros(n, np.int64) if live is None else live.n_tokens,
    )


def writable(trace: RoutingTrace) -> RoutingTrace:
    """A copy in memory whose rows may be changed."""
    assert trace.gate_weights is not None
    return RoutingTrace(
        np.array(trace.expert_ids), np.array(trace.gate_weights), trace.requests, trace.metadata
    )


def changed(run: Run, recorded: RoutingTrace) -> tuple[float, float]:
    """Shares of decoded (token, layer) sets, and of expert choices, that are not the recorded."""
    ours, theirs = run.trace.expert_ids[run.visited], recorded.expert_ids[run.visited]
    kept = (ours[..., None] == theirs[..., None, :]).any(-1)
    return float(1 - kept.all(-1).mean()), float(1 - kept.mean())
