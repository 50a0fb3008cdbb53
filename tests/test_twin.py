"""The compiled kernel and its slow twin agree on random episodes, bytes exactly."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ndp_gym.cost import cost_table, requantise_s
from ndp_gym.outcome import Outcome
from ndp_gym.plan import Plan
from ndp_gym.quality import layer_weights, rel_mse_table
from ndp_gym.simulate import State, Window, initial_state, transition
from tests.random_cases import Case, random_case
from tests.twin import twin_window
from tests.twin_types import Cached, Key, Rules, Token, Totals, TwinPlan, TwinState

EXACT = (
    "tokens", "routed", "hits", "hbm_weight_bytes", "far_weight_bytes", "activation_bytes",
    "fetch_bytes", "migration_bytes", "wasted_bytes", "load_bytes", "n_repaired", "step_tokens",
    "layer_hits", "layer_routed",
)  # fmt: skip
CLOSE = (
    "decode_s", "load_s", "requantise_s", "step_s", "layer_s", "gpu_s", "far_s", "link_s",
    "stall_s", "layer_error", "layer_energy", "gate_energy", "delta_nll",
)  # fmt: skip
EVENTS = {
    "load", "load repaired", "repair later", "arrival in mid-window", "arrival", "head carried on",
    "head dropped", "width change waits", "width change arrives", "idle slot", "idle window",
    "ends in the window", "in_place none", "fetch none", "cache hit", "eviction",
    "cached copy adopted", "hit pushed out", "copy larger than the cache",
    "cached copy dropped",
    "fetch completes a promotion", "head completed by a fetch",
    "storage only", "requantise", "sliding window", "dense layers", "MLA", "GQA", "gate weights",
    "gate profile", "far floor", "no overlap", "full overlap", "part overlap", "default order",
    "default service", "super expert low", "mixed tiers in a layer", "service changes",
    "balance none", "balance moves none", "balance moves some", "balance moves all",
    "balance reorders", "credit carried on", "rank beyond the list",
    "another width than the plan's", "wider cached copy serves", "narrower cached copy is a miss",
    "copy of another width gives way", "fetch at another width than the promotion's",
    "prefetch is late", "prefetch is in time", "prefetch in vain",
    "prefetch uses time of earlier layers", "prefetch finds earlier layers full",
    *(f"{cache} {scope}" for cache in ("lru", "lfu", "fifo") for scope in ("layer", "global")),
}  # fmt: skip


def rules_of(case: Case) -> Rules:
    """The constants of an episode in the twin's words."""
    model, system = case.model, case.system
    return Rules(
        cost=cost_table(model, system),
        n_layers=model.n_layers,
        n_experts=model.n_experts,
        rel_mse=rel_mse_table(model, system).tolist(),
        requantise_s=[requantise_s(model, system, b) for b in system.stored_bits],
        far_computes=system.far.can_compute,
        layer_weights=layer_weights(model).tolist(),
        kappa=case.quality.kappa,
        super_experts=model.super_experts,
    )


def grid(array: NDArray[Any]) -> dict[Key, Any]:
    """[L, E] array as a dict of plain numbers."""
    return {(int(i), int(e)): array[i, e].item() for i, e in np.ndindex(array.shape)}


def twin_state(state: State) -> TwinState:
    """A state of the library in the twin's words."""
    n_experts = state.hbm_bits.shape[1]
    cached = {key: bits for key, bits in grid(state.cache_bits).items() if bits}
    return TwinState(
        hbm=grid(state.hbm_bits),
        far=grid(state.far_bits),
        target=grid(state.target_bits),
        made=grid(state.made_bits),
        queue=[divmod(int(code), n_experts) for code in state.queue],
        head_bytes=int(state.head_bytes),
        cache={
            key: Cached(bits=bits, time=int(state.cache_time[key]), uses=int(state.cache_uses[key]))
            for key, bits in cached.items()
        },
        tick=int(state.tick),
        credit=state.credit,
        load=grid(state.load),
        fresh=state.is_fresh,
    )


def twin_plan(plan: Plan, case: Case) -> TwinPlan:
    """A plan of the library in the twin's words."""
    service = plan.service or case.system.default_service
    return TwinPlan(
        tier=grid(plan.placement.tier),
        bits=grid(plan.placement.bitwidth),
        order=None if plan.migration_order is None else grid(plan.migration_order),
        kind=service.kind,
        cache=service.cache,
        scope=service.scope,
        credit=service.credit,
        rank_bits=service.rank_bits,
        depth=service.prefetch.depth if service.prefetch else 0,
        recall=service.prefetch.recall if service.prefetch else 0.0,
        precision=service.prefetch.precision if service.prefetch else 1.0,
    )


def tokens_of(window: Window) -> list[list[Token]]:
    """The live tokens of each decode step, in slot order."""
    steps = []
    for w in range(window.length):
        tokens = []
        for first, n, context in zip(window.first_row, window.n_rows, window.context, strict=True):
            if w >= n:
                continue
            experts = window.expert_ids[first + w].tolist()
            if window.gate_weights is None:
                assert window.gate_profile is not None
                gates = [window.gate_profile.tolist()] * len(experts)
            else:
                gates = window.gate_weights[first + w].astype(float).tolist()
            tokens.append(Token(context=int(context) + w + 1, experts=experts, gates=gates))
        steps.append(tokens)
    return steps


def assert_same_outcome(got: Outcome, want: Totals, ref: Totals) -> None:
    """Bytes and counts exactly, seconds and errors to a relative 1e-9."""
    for name in EXACT:
        assert numbers(getattr(got, name)) == numbers(getattr(want, name)), name
    assert numbers(got.counts) == numbers(want.counts)
    assert numbers(got.served_tokens) == numbers(want.served_tokens)
    for name in CLOSE:
        assert_close(getattr(got, name), getattr(want, name), name)
    for name in ("decode_s", "delta_nll", "layer_s", "layer_error"):
        assert_close(getattr(got, f"ref_{name}"), getattr(ref, name), f"ref_{name}")


def assert_close(got: object, want: object, name: str) -> None:
    """Equal to a relative 1e-9, or to 1e-16 where terms cancel."""
    pairs = zip(numbers(got), numbers(want), strict=True)
    bad = [(a, b) for a, b in pairs if not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-16)]
    assert not bad, f"{name}: (kernel, twin) = {bad}"


def numbers(values: Any) -> list[float]:
    """A scalar, list, array or dict over keys as one flat list."""
    flat = np.ravel(list(values.values()) if isinstance(values, dict) else values)
    return [number.item() for number in flat]


def run_case(case: Case) -> Counter[str]:
    """Replay one episode twice, compare every window, and count what happened in it."""
    seen = Counter(describe_case(case))
    rules = rules_of(case)
    state = initial_state(case.model, case.system)
    twin = twin_state(state)
    service: tuple[str, str, str] | None = None
    for plan, window, budget in zip(case.plans, case.windows, case.budgets, strict=True):
        words, before = twin_plan(plan, case), twin
        state, got = transition(
            state, plan, window, case.model, case.system, budget_bytes=budget, quality=case.quality
        )
        twin, want, ref = twin_window(twin, words, tokens_of(window), rules, budget_bytes=budget)
        assert_same_outcome(got, want, ref)
        assert twin_state(state) == twin
        seen.update(want.events)
        seen.update(describe_window(window, plan, words, before, want))
        if service not in (None, (words.kind, words.cache, words.scope)):
            seen["service changes"] += 1
        service = (words.kind, words.cache, words.scope)
    return seen


def describe_case(case: Case) -> list[str]:
    """Names of the features a random model and system have."""
    model, system = case.model, case.system
    overlap = {0.0: "no overlap", 1.0: "full overlap"}.get(system.overlap, "part overlap")
    seen = [overlap, type(model.attention).__name__]
    seen += ["dense layers"] * (model.n_dense_layers > 0)
    seen += ["sliding window"] * any(model.sliding_layers)
    seen += ["storage only"] * (not system.far.can_compute)
    return seen


def describe_window(
    window: Window, plan: Plan, words: TwinPlan, before: TwinState, want: Totals
) -> list[str]:
    """Names of what one window and its plan contain."""
    seen = [f"{words.kind} none" if words.cache == "none" else f"{words.cache} {words.scope}"]
    seen.append("gate profile" if window.gate_weights is None else "gate weights")
    seen += ["default order"] * (plan.migration_order is None)
    seen += ["default service"] * (plan.service is None)
    seen += ["idle window"] * bool((window.n_rows == 0).all())
    seen += ["idle slot"] * bool((window.n_rows == 0).any() and (window.n_rows > 0).any())
    ends = (window.n_rows > 0) & (window.n_rows < window.length)
    seen += ["ends in the window"] * bool(ends.any())
    seen += ["requantise"] * (want.requantise_s > 0)
    if want.n_repaired:
        seen.append("load repaired" if before.fresh else "repair later")
    return seen


def test_kernel_agrees_with_its_twin_on_thousands_of_windows() -> None:
    seen: Counter[str] = Counter()
    for seed in range(800):
        try:
            seen += run_case(random_case(seed))
        except AssertionError as error:
            raise AssertionError(f"random_case({seed}): {error}") from error
    assert seen["gate weights"] + seen["gate profile"] > 3000  # windows
    assert {event: seen[event] for event in EVENTS if seen[event] < 10} == {}


@pytest.mark.slow
def test_kernel_agrees_with_its_twin_on_a_large_sweep() -> None:
    for seed in range(10_000, 13_000):
        run_case(random_case(seed))


@given(
    seed=st.integers(0, 2**32 - 1),
    n_layers=st.integers(1, 2),
    n_experts=st.integers(1, 4),
    n_windows=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_kernel_agrees_with_its_twin_on_tiny_episodes(
    seed: int, n_layers: int, n_experts: int, n_windows: int
) -> None:
    run_case(random_case(seed, n_layers=n_layers, n_experts=n_experts, n_windows=n_windows))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_idle_windows_take_no_time_and_move_nothing(seed: int) -> None:
    case = random_case(seed)
    windows = [replace(w, n_rows=np.zeros_like(w.n_rows)) for w in case.windows]
    state = initial_state(case.model, case.system)
    for plan, window, budget in zip(case.plans, windows, case.budgets, strict=True):
        state, got = transition(
            state, plan, window, case.model, case.system, budget_bytes=budget, quality=case.quality
        )
        assert got.step_s.sum() == 0
        assert got.migration_bytes == got.fetch_bytes == got.activation_bytes == 0
        assert got.delta_nll == 0
