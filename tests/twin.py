"""Slow, obviously correct twin of one decode window: plain ints, floats, lists and dicts.

It exists to be compared with the compiled kernel on random inputs and shares no code with it. Read
it top to bottom: apply the plan, then for every decode step compute every layer, then let the
migration queue use the link time that was left over. An expert is a key ``(layer, expert)``;
0 bits = no copy.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from tests.twin_plan import apply_plan, evict_until_it_fits, scope_bytes
from tests.twin_services import copying, far_expert_s, serve
from tests.twin_types import (
    Cached,
    Key,
    Routed,
    Rules,
    Token,
    Totals,
    TwinPlan,
    TwinState,
    empty_totals,
)


def twin_window(
    state: TwinState,
    plan: TwinPlan,
    steps: Sequence[Sequence[Token]],
    rules: Rules,
    *,
    budget_bytes: int,
) -> tuple[TwinState, Totals, Totals]:
    """State after the window, what happened in it, and what the reference would have done.

    ``steps[w]`` lists the live tokens of decode step ``w`` in slot order.
    """
    state = deepcopy(state)
    out = empty_totals(rules)
    capacity = apply_plan(state, plan, rules, out, budget_bytes)
    idle = [0.0]
    for w, tokens in enumerate(steps):
        if not tokens:  # an idle step takes no time and moves nothing
            out.step_s.append(0.0)
            out.step_tokens.append(0)
            continue
        if plan.depth < rules.n_layers:  # only who looks a step ahead knows the next token's
            idle = [0.0]
        spare_s = decode_step(state, plan, tokens, rules, out, capacity, idle)
        advance_queue(state, rules, out, spare_s, is_last=w == len(steps) - 1)
    out.decode_s += sum(out.step_s)
    out.delta_nll = delta_nll(rules, out)
    state.load = {key: float(m) for key, m in out.counts.items()}
    return state, out, reference(steps, rules)


def decode_step(
    state: TwinState,
    plan: TwinPlan,
    tokens: Sequence[Token],
    rules: Rules,
    out: Totals,
    capacity: int,
    idle: list[float],
) -> float:
    """Run one decode step over all layers; returns the link seconds nobody used."""
    step_s, spare_s = outside_the_experts(tokens, rules)
    idle[-1] += spare_s  # dense layers leave the link free
    for layer in range(rules.n_layers):
        routed = route(layer, tokens)
        served = serve(state, plan, rules, out, layer=layer, tokens=tokens, routed=routed)
        work = LayerWork()
        for key, (bits, tier, is_hit) in served.items():
            m = routed.tokens[key]
            (work.gpu if tier == 0 else work.far)[key] = (bits, m)
            if tier == 0 and not is_hit:
                work.fetched.append(bits)
            out.hits += m if is_hit else 0
            out.layer_hits[layer] += m if is_hit else 0
            account(key, routed, bits, tier, rules, out)
        unpinned = [key for key in served if not state.hbm[key]]
        spare_s += finish_layer(layer, tokens, work, rules, out, step=step_s, plan=plan, idle=idle)
        if plan.kind == "fetch":
            for key in unpinned:
                bits, _, is_hit = served[key]
                update_cache(state, plan, rules, out, capacity, key=key, bits=bits, is_hit=is_hit)
    idle[-1] += sum(step_s[1:3])  # so do head and engine
    out.step_s.append(sum(step_s))
    out.step_tokens.append(len(tokens))
    out.tokens += len(tokens)
    return spare_s


def route(layer: int, tokens: Sequence[Token]) -> Routed:
    """Count one step's tokens per expert of one layer."""
    work = Routed()
    for token in tokens:
        for e, gate in zip(token.experts[layer], token.gates[layer], strict=True):
            work.tokens[layer, e] = work.tokens.get((layer, e), 0) + 1
            work.energy[layer, e] = work.energy.get((layer, e), 0.0) + gate * gate
    return work


@dataclass(kw_only=True)
class LayerWork:
    """One layer and step: (bits, tokens) of each expert by device; widths fetched on demand."""

    gpu: dict[Key, tuple[int, int]] = field(default_factory=dict)
    far: dict[Key, tuple[int, int]] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)


def account(key: Key, work: Routed, bits: int, tier: int, rules: Rules, out: Totals) -> None:
    """Every routed token counts once, where and at the width it was really served."""
    layer, e = key
    m, energy = work.tokens[key], work.energy[key]
    out.routed += m
    out.layer_routed[layer] += m
    out.counts[key] += m
    out.gate_energy[key] += energy
    out.layer_energy[layer] += energy
    out.layer_error[layer] += energy * rules.rel_mse[layer][e][rules.index(bits)]
    out.served_tokens[tier, rules.index(bits)] += m
    out.low_tokens[key] += m if bits <= 2 else 0
    if tier == 0:
        out.hbm_weight_bytes += rules.weight_bytes(bits)
    else:
        out.far_weight_bytes += rules.weight_bytes(bits)


def outside_the_experts(tokens: Sequence[Token], rules: Rules) -> tuple[list[float], float]:
    """Seconds of a step outside the routed layers, and those of them that leave the link free."""
    c = rules.cost
    full = sum(token.context for token in tokens)
    near = sum(min(token.context, int(c.sliding_window)) for token in tokens)
    dense_s = (c.n_dense_full + c.n_dense_sliding) * c.dense_layer_s + c.kv_token_s * (
        c.n_dense_full * full + c.n_dense_sliding * near
    )
    return [dense_s, c.head_s, c.engine_base_s + c.engine_token_s * len(tokens)], dense_s


def finish_layer(
    layer: int,
    tokens: Sequence[Token],
    work: LayerWork,
    rules: Rules,
    out: Totals,
    *,
    step: list[float],
    plan: TwinPlan | None,
    idle: list[float],
) -> float:
    """Add one layer's seconds and bytes to totals and step; returns its spare link seconds.

    Without ``plan`` (the reference) nothing is prefetched.
    """
    c = rules.cost
    contexts = [t.context for t in tokens]
    if c.layer_slides[layer]:
        contexts = [min(s, int(c.sliding_window)) for s in contexts]
    attention_s = c.layer_s[layer] + c.kv_token_s * sum(contexts)

    gpu_s = 0.0
    if work.gpu:
        launches_s = sum(c.gpu_launch_s[rules.index(b)] for b in {b for b, _ in work.gpu.values()})
        memory_s = sum(c.gpu_weight_s[rules.index(b)] for b, _ in work.gpu.values())
        compute_s = c.gpu_token_s * sum(m for _, m in work.gpu.values())
        gpu_s = launches_s + max(memory_s, compute_s)
    copies = copying(work.fetched, attention_s + gpu_s, rules, plan, idle, out)

    activations_s, far_s = 0.0, 0.0
    if work.far:
        crossing = sum(any((layer, e) in work.far for e in t.experts[layer]) for t in tokens)
        out.activation_bytes += crossing * int(c.activation_bytes)
        activations_s = 2 * c.link_latency_s + crossing * c.activation_token_s
        experts_s = 0.0
        for bits, m in work.far.values():
            experts_s += far_expert_s(bits, m, rules)
        far_s = max(c.far_floor_s, activations_s + experts_s)
        out.events["far floor"] += far_s > activations_s + experts_s
    out.events["mixed tiers in a layer"] += bool(work.gpu and work.far)

    near_s = gpu_s + copies.exposed_s
    total_s = attention_s + c.overlap * max(near_s, far_s) + (1 - c.overlap) * (near_s + far_s)
    out.fetch_bytes += copies.n_bytes
    out.layer_s[layer] += total_s
    out.gpu_s[layer] += gpu_s
    out.far_s[layer] += max(0.0, far_s - activations_s)
    out.link_s[layer] += activations_s + copies.link_s
    out.stall_s[layer] += total_s - attention_s - gpu_s
    step.append(total_s)
    return float(total_s - activations_s - copies.link_s)


def update_cache(
    state: TwinState,
    plan: TwinPlan,
    rules: Rules,
    out: Totals,
    capacity: int,
    *,
    key: Key,
    bits: int,
    is_hit: bool,
) -> None:
    """Touch a cached copy, complete a promotion, or keep the new copy if it fits."""
    if state.target[key]:
        if bits != state.target[key]:
            out.events["fetch at another width than the promotion's"] += 1
            return
        if state.queue[0] == key:
            out.wasted_bytes += state.head_bytes
            out.events["head completed by a fetch"] += state.head_bytes > 0
            state.head_bytes = 0
        state.queue.remove(key)
        state.hbm[key] = bits
        state.cache.pop(key, None)
        out.events["fetch completes a promotion"] += 1
        return
    if plan.cache == "none":
        return
    if is_hit:
        if key not in state.cache:  # it served, but a copy fetched in this step has pushed it out
            out.events["hit pushed out"] += 1
            return
        state.tick += 1
        state.cache[key].uses += 1
        out.events["cache hit"] += 1
        if plan.cache != "fifo":
            state.cache[key].time = state.tick
        return
    new_bytes = rules.weight_bytes(bits)
    if new_bytes > scope_bytes(plan, rules, capacity):
        out.events["copy larger than the cache"] += 1
        return
    out.events["copy of another width gives way"] += key in state.cache
    state.cache.pop(key, None)
    evict_until_it_fits(state, plan, rules, out, capacity, key[0], new_bytes=new_bytes)
    state.tick += 1
    state.cache[key] = Cached(bits=bits, time=state.tick, uses=1)


def advance_queue(
    state: TwinState, rules: Rules, out: Totals, spare_s: float, *, is_last: bool
) -> None:
    """Copy as many whole bytes as fit in the spare seconds; arrivals serve from the next step."""
    left = math.floor(max(0.0, spare_s) * rules.cost.link_bytes_per_s)
    while left > 0 and state.queue:
        key = state.queue[0]
        moved = min(left, rules.weight_bytes(state.target[key]) - state.head_bytes)
        left -= moved
        state.head_bytes += moved
        out.migration_bytes += moved
        if state.head_bytes == rules.weight_bytes(state.target[key]):
            out.events["width change arrives"] += state.hbm[key] > 0
            state.hbm[key] = state.target[key]
            state.cache.pop(key, None)
            state.queue.pop(0)
            state.head_bytes = 0
            out.events["arrival" if is_last else "arrival in mid-window"] += 1


def reference(steps: Sequence[Sequence[Token]], rules: Rules) -> Totals:
    """The same tokens with every expert far at 4 bits: no queue, no cache, no memory."""
    out = empty_totals(rules)
    bits = min((int(b) for b in rules.cost.bits), key=lambda b: (abs(b - 4), -b))
    for tokens in filter(None, steps):
        step_s, _ = outside_the_experts(tokens, rules)
        for layer in range(rules.n_layers):
            routed = route(layer, tokens)
            work = LayerWork()
            for key, m in routed.tokens.items():
                if rules.far_computes:
                    work.far[key] = (bits, m)
                else:
                    work.gpu[key] = (bits, m)
                    work.fetched.append(bits)
                account(key, routed, bits, 1 if rules.far_computes else 0, rules, out)
            finish_layer(layer, tokens, work, rules, out, step=step_s, plan=None, idle=[])
        out.step_s.append(sum(step_s))
    out.decode_s = sum(out.step_s)
    out.delta_nll = delta_nll(rules, out)
    return out


def delta_nll(rules: Rules, out: Totals) -> float:
    """Nats lost: weighted relative error, plus 0.8 if all super experts ran at 2 bits or less."""
    total = 0.0
    for layer in range(rules.n_layers):
        if out.layer_energy[layer] > 0:
            share = out.layer_error[layer] / out.layer_energy[layer]
            total += rules.kappa * rules.layer_weights[layer] * share
    out.events["super expert low"] += any(out.low_tokens[key] for key in rules.super_experts)
    shares = [
        out.low_tokens[key] / out.counts[key] if out.counts[key] else 0.0
        for key in rules.super_experts
    ]
    return total + (0.8 * sum(shares) / len(shares) if shares else 0.0)
