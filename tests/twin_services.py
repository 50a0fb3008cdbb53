"""Third part of the kernel's slow twin: which copy serves an expert that a step needs."""

from collections.abc import Sequence
from typing import NamedTuple

from tests.twin_types import Key, Routed, Rules, Token, Totals, TwinPlan, TwinState


class Served(NamedTuple):
    """The copy that serves; tier 0 is the GPU, where a miss means a copy on demand, 1 is far."""

    bits: int
    tier: int
    is_hit: bool


def serve(
    state: TwinState,
    plan: TwinPlan,
    rules: Rules,
    out: Totals,
    *,
    layer: int,
    tokens: Sequence[Token],
    routed: Routed,
) -> dict[Key, Served]:
    """The copy that serves each active expert of a layer, in order of first appearance."""
    served = {}
    for key in routed.tokens:
        if state.hbm[key]:
            served[key] = Served(state.hbm[key], tier=0, is_hit=True)
        elif plan.kind == "fetch":
            served[key] = fetched(key, state, plan, tokens, out)
        else:
            served[key] = Served(state.far[key], tier=1, is_hit=False)
    if plan.kind == "balance":
        far = [key for key in routed.tokens if served[key].tier == 1]
        busiest = sorted(far, key=lambda key: -routed.tokens[key])  # stable: first appearance
        if plan.credit is None:
            n_moved = best_split(busiest, served, routed, rules)
        else:
            n_moved = spend_credit(state, plan.credit, len(far), out)
        for key in busiest[:n_moved]:
            served[key] = Served(state.far[key], tier=0, is_hit=False)
        if far:
            share = {0: "none", len(far): "all"}.get(n_moved, "some")
            out.events[f"balance moves {share}"] += 1
            ordered = busiest != far
            out.events["balance reorders"] += ordered and 0 < n_moved < len(far)
    return served


def fetched(
    key: Key, state: TwinState, plan: TwinPlan, tokens: Sequence[Token], out: Totals
) -> Served:
    """A cached copy that will do, or one at the width the plan, or the tokens' ranks, ask for."""
    cached = state.cache[key].bits if key in state.cache else 0
    planned = state.target[key] or state.far[key]
    if not plan.rank_bits:
        return Served(planned, tier=0, is_hit=cached == planned)
    layer, e = key
    ranks = [t.experts[layer].index(e) for t in tokens if e in t.experts[layer]]
    needed = max(plan.rank_bits[min(rank, len(plan.rank_bits) - 1)] for rank in ranks)
    out.events["rank beyond the list"] += any(rank >= len(plan.rank_bits) for rank in ranks)
    out.events["another width than the plan's"] += needed != planned
    out.events["wider cached copy serves"] += cached > needed
    out.events["narrower cached copy is a miss"] += 0 < cached < needed
    return Served(max(cached, needed), tier=0, is_hit=cached >= needed)


def best_split(busiest: list[Key], served: dict[Key, Served], routed: Routed, rules: Rules) -> int:
    """How many of the busiest to copy so that the slower of the two sides is fastest."""
    c = rules.cost
    near_s = sum(c.gpu_weight_s[rules.index(s.bits)] for s in served.values() if s.tier == 0)
    sides = []
    for n_moved in range(len(busiest) + 1):
        copied = [rules.index(served[key].bits) for key in busiest[:n_moved]]
        moved_s = sum(c.copy_s[i] + c.gpu_weight_s[i] for i in copied)
        far_s = sum(
            far_expert_s(served[key].bits, routed.tokens[key], rules) for key in busiest[n_moved:]
        )
        sides.append(max(near_s + moved_s, far_s))
    return sides.index(min(sides))


def spend_credit(state: TwinState, per_expert: float, n_far: int, out: Totals) -> int:
    """Whole credits that have been saved up, at most one per expert."""
    out.events["credit carried on"] += 0 < state.credit < 1
    state.credit += per_expert * n_far
    n_moved = min(int(state.credit + 1e-12), n_far)
    state.credit -= n_moved
    return n_moved


def far_expert_s(bits: int, n_tokens: int, rules: Rules) -> float:
    """Seconds of one expert on the far device."""
    c, i = rules.cost, rules.index(bits)
    return float(max(c.far_weight_s[i], c.far_token_s[i] * max(n_tokens, c.far_min_tokens)))


class Copying(NamedTuple):
    """Copies on demand of one layer: seconds they prolong it, seconds of the link, bytes."""

    exposed_s: float
    link_s: float
    n_bytes: int


def copying(
    widths: list[int],
    own_s: float,
    rules: Rules,
    plan: TwinPlan | None,
    idle: list[float],
    out: Totals,
) -> Copying:
    """What copies of these widths cost in a layer that takes ``own_s`` without them.

    ``idle`` lists the seconds that the link has left in each layer so far, this one excluded.
    """
    copy_s = sum(rules.cost.copy_s[rules.index(bits)] for bits in widths)
    n_bytes = sum(rules.weight_bytes(bits) for bits in widths)
    if plan is None or plan.depth == 0:
        return Copying(copy_s, copy_s, n_bytes)
    idle.append(own_s)
    wrong = plan.recall * (1 / plan.precision - 1)
    late_s = plan.recall * copy_s + wrong * copy_s
    for i in range(max(0, len(idle) - plan.depth), len(idle)):
        hidden_s = min(idle[i], late_s)
        out.events["prefetch uses time of earlier layers"] += hidden_s > 0 and i < len(idle) - 1
        out.events["prefetch finds earlier layers full"] += idle[i] < 0.9 * own_s
        idle[i] -= hidden_s
        late_s -= hidden_s
    if widths:
        out.events["prefetch is late" if late_s > 0 else "prefetch is in time"] += 1
        out.events["prefetch in vain"] += wrong > 0
    return Copying(
        exposed_s=late_s + (1 - plan.recall) * copy_s,
        link_s=copy_s + wrong * copy_s,
        n_bytes=n_bytes + int(wrong * n_bytes),
    )
