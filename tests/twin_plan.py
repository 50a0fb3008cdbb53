"""First half of the kernel's slow twin: what a plan does before the clock runs."""

from tests.twin_types import Key, Rules, Totals, TwinPlan, TwinState


def apply_plan(
    state: TwinState, plan: TwinPlan, rules: Rules, out: Totals, budget_bytes: int
) -> int:
    """Repair, demote, queue, requantise, first load; returns the bytes left for a cache."""
    wanted = {key: plan.bits[key] if plan.tier[key] == 0 else 0 for key in rules.keys}
    order = state.load if plan.order is None else plan.order
    capacity = repair(wanted, state, order, rules, out, budget_bytes)
    for key in rules.keys:
        if wanted[key] == 0:
            state.hbm[key] = 0
            state.far[key] = plan.bits[key]
        elif state.hbm[key] == 0 and state.far[key] == 0:
            state.far[key] = plan.bits[key]
    adopt_cached_copies(state, wanted, plan, out)
    order_queue(state, wanted, order, rules, out)
    requantise(state, plan, rules, out)
    if state.fresh:
        out.events["load"] += any(wanted.values())
        out.load_bytes = sum(rules.weight_bytes(wanted[key]) for key in rules.keys)
        out.load_s = out.load_bytes / rules.cost.link_bytes_per_s + out.requantise_s
        state.hbm = dict(wanted)
        state.queue = []
        state.fresh = False
    else:
        out.decode_s += out.requantise_s
    make_room_after_plan(state, plan, rules, out, capacity)
    return capacity


def repair(
    wanted: dict[Key, int],
    state: TwinState,
    order: dict[Key, float],
    rules: Rules,
    out: Totals,
    budget_bytes: int,
) -> int:
    """Drop the least important wanted experts until the rest fits; returns the bytes left over."""

    def charge(key: Key) -> int:
        if wanted[key] == 0:
            return 0
        return max(rules.weight_bytes(wanted[key]), rules.weight_bytes(state.hbm[key]))

    while sum(charge(key) for key in rules.keys) > budget_bytes:
        candidates = [key for key in rules.keys if wanted[key]]
        lowest = min(order[key] for key in candidates)
        wanted[max(key for key in candidates if order[key] == lowest)] = 0
        out.n_repaired += 1
    return budget_bytes - sum(charge(key) for key in rules.keys)


def adopt_cached_copies(
    state: TwinState, wanted: dict[Key, int], plan: TwinPlan, out: Totals
) -> None:
    """A cached copy of the wanted width becomes the pinned one; copies of other widths go."""
    keeps_cache = plan.kind == "fetch" and plan.cache != "none"
    for key, copy in list(state.cache.items()):
        if wanted[key] == 0 and keeps_cache:
            continue
        if state.hbm[key] == 0 and copy.bits == wanted[key]:
            state.hbm[key] = wanted[key]
            out.events["cached copy adopted"] += 1
        else:
            out.events["cached copy dropped"] += 1
        del state.cache[key]


def order_queue(
    state: TwinState, wanted: dict[Key, int], order: dict[Key, float], rules: Rules, out: Totals
) -> None:
    """The partly copied expert keeps the head if still wanted; the others are sorted anew."""
    head: list[Key] = []
    if state.head_bytes > 0:
        key = state.queue[0]
        if wanted[key] == state.target[key] and state.hbm[key] != wanted[key]:
            head = [key]
            out.events["head carried on"] += 1
        else:
            out.wasted_bytes += state.head_bytes
            state.head_bytes = 0
            out.events["head dropped"] += 1
    missing = [k for k in rules.keys if wanted[k] and wanted[k] != state.hbm[k] and k not in head]
    state.queue = head + sorted(missing, key=lambda key: (-order[key], key))
    state.target = dict(wanted)
    out.events["width change waits"] += any(state.hbm[key] for key in state.queue)


def requantise(state: TwinState, plan: TwinPlan, rules: Rules, out: Totals) -> None:
    """Every new width but the 16-bit master must be made first: free unless in requantise mode."""
    for key in rules.keys:
        bits = plan.bits[key]
        if bits not in (state.made[key], 16):
            out.requantise_s += rules.requantise_s[rules.index(bits)]
        state.made[key] = bits


def make_room_after_plan(
    state: TwinState, plan: TwinPlan, rules: Rules, out: Totals, capacity: int
) -> None:
    """Evict cached copies that no longer fit beside the pinned experts."""
    for layer in range(rules.n_layers) if plan.scope == "layer" else [0]:
        evict_until_it_fits(state, plan, rules, out, capacity, layer, new_bytes=0)


def scope_bytes(plan: TwinPlan, rules: Rules, capacity: int) -> int:
    """Bytes of the whole cache, or of each layer's."""
    return capacity // rules.n_layers if plan.scope == "layer" else capacity


def evict_until_it_fits(
    state: TwinState,
    plan: TwinPlan,
    rules: Rules,
    out: Totals,
    capacity: int,
    layer: int,
    *,
    new_bytes: int,
) -> None:
    """Make room for ``new_bytes`` in the cache that ``layer`` uses."""
    while True:
        inside = [key for key in state.cache if plan.scope == "global" or key[0] == layer]
        used = sum(rules.weight_bytes(state.cache[key].bits) for key in inside)
        if used + new_bytes <= scope_bytes(plan, rules, capacity):
            return
        if plan.cache == "lfu":
            victim = min(inside, key=lambda key: (state.cache[key].uses, state.cache[key].time))
        else:
            victim = min(inside, key=lambda key: state.cache[key].time)
        del state.cache[victim]
        out.events["eviction"] += 1
