"""The compiled clock: tokens to counts, counts to seconds and bytes, for any number of lanes.

Two stages. `count_window` turns recorded ids into tokens and gate energy per (step, expert);
`replay_window` turns those counts into time, bytes and errors under a placement. The second also
prices the stateless reference, planners and bounds. Experts are addressed by code
``x = layer * n_experts + expert``. Nothing here knows Gymnasium; the pure-Python twin in
``tests/twin.py`` follows the same rules (docs/model.md) and must agree.

All compiled functions stand in this one file: numba's cache on disk notices changes of a function's
own file only.
"""

import numpy as np
from numba import njit

from ndp_gym.kernel_data import Counts

# columns of `Replay.layer` [N, L, 9]
LAYER_S, GPU_S, FAR_S, LINK_S, STALL_S, HITS, ROUTED, ERROR, ENERGY = range(9)
# columns of `Replay.totals` [N, 9] and `Planned.totals` [N, 3]
MIGRATION, OVERTAKEN, ACTIVATION, FETCH, HBM_BYTES, FAR_BYTES, CONTEXT, SLIDING, STEPS = range(9)
N_REPAIRED, LOAD_BYTES, CANCELLED = range(3)
# columns of `LaneState.scalars` [N, 4] and of `Plans.services` [N, 3]
QUEUE_LENGTH, HEAD_BYTES, TICK, FRESH = range(4)
KIND, CACHE, SCOPE = range(3)
CREDIT, DEPTH, RECALL, PRECISION = range(4)  # columns of `Service.rates`
IN_PLACE, FETCH_ALL, BALANCE = range(3)
GLOBAL_SCOPE = 1
COPIED = 16  # added to the width index of an expert copied on demand, see `_decide`
NO_CACHE, LRU, LFU, FIFO = range(4)
LOW_BITS = 2  # widths at which a super expert collapses, docs/model.md section 6


def empty_counts(n_steps: int, n_layers: int, n_experts: int, n_slots: int, top_k: int) -> Counts:
    """Zeroed scratch for one window of up to ``n_slots`` tokens per step."""
    n_active = min(n_experts, n_slots * top_k) + 1  # one to spare for `count_window`
    return Counts(
        np.zeros((n_steps, n_layers * n_experts), np.int32),
        np.zeros((n_steps, n_layers * n_experts), np.float64),
        np.zeros((n_steps, n_layers, n_active), np.int32),
        np.zeros((n_steps, n_layers), np.int32),
    )


@njit(cache=True, nogil=True)
def count_window(windows, lane, n_experts, counts):  # type: ignore[no-untyped-def]
    """Stage one: tokens and gate energy per (step, expert) of one lane, into zeroed ``counts``."""
    ids, gates, half = windows.expert_ids, windows.gate_bits, windows.half
    n_layers, top_k = ids.shape[1], ids.shape[2]
    recorded, profile = gates.shape[0] > 0, windows.gate_profile
    for step in range(counts.tokens.shape[0]):
        tokens, energy = counts.tokens[step], counts.energy[step]
        active, n_active = counts.active[step], counts.n_active[step]
        for slot in range(windows.n_rows.shape[1]):
            if step >= windows.n_rows[lane, slot]:
                continue
            row = windows.first_row[lane, slot] + step
            for layer in range(n_layers):
                base = layer * n_experts
                for rank in range(top_k):
                    x = base + np.intp(ids[row, layer, rank])
                    # no branch on the data: a routing decision is what a processor predicts worst
                    active[layer, n_active[layer]] = x
                    n_active[layer] += np.int32(tokens[x] == 0)
                    tokens[x] += 1
                    gate = profile[rank]
                    if recorded:
                        pattern = np.intp(gates[row, layer, rank])
                        exponent = (pattern >> 10) & 31
                        gate = (half[0, exponent] + (pattern & 1023)) * half[1, exponent]
                    energy[x] += gate * gate


@njit(cache=True, nogil=True)
def collect_counts(counts, total, energy):  # type: ignore[no-untyped-def]
    """Sum ``counts`` over the steps into ``total`` and ``energy`` [X]; zero the scratch again."""
    for step in range(counts.tokens.shape[0]):
        for layer in range(counts.n_active.shape[1]):
            for i in range(counts.n_active[step, layer]):
                x = counts.active[step, layer, i]
                total[x] += counts.tokens[step, x]
                energy[x] += counts.energy[step, x]
                counts.tokens[step, x] = 0
                counts.energy[step, x] = 0.0
            counts.n_active[step, layer] = 0


@njit(cache=True, nogil=True)
def _copy_bytes(table, bits):  # type: ignore[no-untyped-def]
    return table.weight_bytes[table.index_of[bits]]


@njit(cache=True, nogil=True)
def _sift(codes, root, length, order):  # type: ignore[no-untyped-def]
    """Let ``codes[root]`` sink in a heap whose top goes last: lowest order, then largest code."""
    moving = codes[root]
    while 2 * root + 1 < length:
        child = 2 * root + 1
        if child + 1 < length:
            left, right = codes[child], codes[child + 1]
            if order[right] < order[left] or (order[right] == order[left] and right > left):
                child += 1
        x = codes[child]
        if order[moving] < order[x] or (order[moving] == order[x] and moving > x):
            break
        codes[root] = x
        root = child
    codes[root] = moving


@njit(cache=True, nogil=True)
def _rank(codes, length, order):  # type: ignore[no-untyped-def]
    """Heapsort ``codes[:length]``: highest order first, the smaller code first among equals."""
    for root in range(length // 2 - 1, -1, -1):
        _sift(codes, root, length, order)
    for last in range(length - 1, 0, -1):
        codes[0], codes[last] = codes[last], codes[0]
        _sift(codes, 0, last, order)


@njit(cache=True, nogil=True)
def _charge(want, hbm, table):  # type: ignore[no-untyped-def]
    """Bytes a wanted copy counts against the budget: the larger of the old and the new width."""
    new = _copy_bytes(table, want)
    return new if hbm == 0 else max(new, _copy_bytes(table, hbm))


@njit(cache=True, nogil=True)
def _repair(want, order, hbm, table, budget):  # type: ignore[no-untyped-def]
    """Unwant the experts of lowest order until their charges fit -> (bytes charged, dropped)."""
    wanted = np.empty(want.size, np.int64)
    n_wanted, total, dropped = 0, 0, 0
    for x in range(want.size):
        if want[x] != 0:
            wanted[n_wanted] = x
            n_wanted += 1
            total += _charge(want[x], hbm[x], table)
    if total > budget:
        _rank(wanted, n_wanted, order)
        while total > budget:
            n_wanted -= 1
            x = wanted[n_wanted]
            total -= _charge(want[x], hbm[x], table)
            want[x] = 0
            dropped += 1
    return total, dropped


@njit(cache=True, nogil=True)
def _requeue(want, order, state, lane):  # type: ignore[no-untyped-def]
    """Sort the promotions behind a head that is still wanted -> bytes of a cancelled head."""
    hbm, target, queue = state.hbm[lane], state.target[lane], state.queue[lane]
    scalars = state.scalars[lane]
    cancelled, length, head = 0, 0, -1
    if scalars[QUEUE_LENGTH] > 0 and scalars[HEAD_BYTES] > 0:
        x = queue[0]
        if want[x] == target[x] and hbm[x] != want[x]:
            head, length = x, 1
        else:
            cancelled = scalars[HEAD_BYTES]
            scalars[HEAD_BYTES] = 0
    waiting = np.empty(want.size, np.int64)
    n_waiting = 0
    for x in range(want.size):
        target[x] = want[x]
        if want[x] != 0 and want[x] != hbm[x] and x != head:
            waiting[n_waiting] = x
            n_waiting += 1
    _rank(waiting, n_waiting, order)
    for i in range(n_waiting):
        queue[length + i] = waiting[i]
    scalars[QUEUE_LENGTH] = length + n_waiting
    return cancelled


@njit(cache=True, nogil=True)
def _evict(first, last, used, capacity, rule, table, state, lane):  # type: ignore[no-untyped-def]
    """Drop cached copies among codes first..last-1 until ``used`` <= ``capacity`` -> bytes used."""
    cache, time, uses = state.cache[lane], state.cache_time[lane], state.cache_uses[lane]
    while used > capacity:
        victim = -1
        for x in range(first, last):
            if cache[x] == 0:
                continue
            if victim < 0:
                victim = x
            elif rule == LFU and uses[x] != uses[victim]:
                if uses[x] < uses[victim]:
                    victim = x
            elif time[x] < time[victim]:
                victim = x
        used -= _copy_bytes(table, cache[victim])
        cache[victim] = 0
    return used


@njit(cache=True, nogil=True)
def _settle_cache(want, free, service, table, n_layers, state, lane):  # type: ignore[no-untyped-def]
    """Pin or drop cached copies that the plan wants, shrink to the space left -> (used, capacity).

    ``used`` has one entry per layer (scope "layer") or only its first in use (scope "global").
    """
    cache, hbm = state.cache[lane], state.hbm[lane]
    used = np.zeros(n_layers, np.int64)
    n_experts = want.size // n_layers
    whole = service[SCOPE] == GLOBAL_SCOPE
    n_scopes = 1 if whole else n_layers
    capacity, size = free // n_scopes, want.size // n_scopes
    for x in range(want.size):
        if cache[x] == 0:
            continue
        if want[x] != 0 or service[KIND] != FETCH_ALL or service[CACHE] == NO_CACHE:
            if want[x] == cache[x] and hbm[x] == 0:
                hbm[x] = want[x]
            cache[x] = 0
        else:
            used[0 if whole else x // n_experts] += _copy_bytes(table, cache[x])
    for scope in range(n_scopes):
        first = scope * size
        used[scope] = _evict(
            first, first + size, used[scope], capacity, service[CACHE], table, state, lane
        )
    return used, capacity


@njit(cache=True, nogil=True)
def _requantise(bits, made, seconds_of):  # type: ignore[no-untyped-def]
    """Seconds the far device spends making widths that a plan asks for and that are not there."""
    seconds = 0.0
    for x in range(bits.size):
        if bits[x] != made[x]:
            seconds += seconds_of[bits[x]]
            made[x] = bits[x]
    return seconds


@njit(cache=True, nogil=True)
def apply_plan(plans, lane, prices, n_layers, state, planned):  # type: ignore[no-untyped-def]
    """Repair, demote, pin, cancel, queue or first-load a plan -> cache (used, capacity)."""
    bits, order, table = plans.bits[lane], plans.order[lane], prices.table
    hbm, far = state.hbm[lane], state.far[lane]
    scalars, totals = state.scalars[lane], planned.totals[lane]
    want = np.zeros(bits.size, np.uint8)
    for x in range(want.size):
        if plans.tier[lane, x] == 0:
            want[x] = bits[x]
    charge, totals[N_REPAIRED] = _repair(want, order, hbm, table, plans.budgets[lane])
    for x in range(want.size):
        if want[x] == 0:
            hbm[x] = 0
            far[x] = bits[x]
        elif far[x] == 0 and hbm[x] == 0:
            far[x] = bits[x]
    free = plans.budgets[lane] - charge
    used, capacity = _settle_cache(want, free, plans.services[lane], table, n_layers, state, lane)
    totals[CANCELLED] = _requeue(want, order, state, lane)
    made_s = _requantise(bits, state.made[lane], prices.requantise_s)
    planned.seconds[lane, 1] = made_s
    if scalars[FRESH] != 0:
        for x in range(want.size):
            if want[x] != 0:
                totals[LOAD_BYTES] += _copy_bytes(table, want[x])
                hbm[x] = want[x]
        planned.seconds[lane, 0] = made_s + totals[LOAD_BYTES] / table.link_bytes_per_s
        scalars[QUEUE_LENGTH] = 0
        scalars[FRESH] = 0
    return used, capacity


@njit(cache=True, nogil=True)
def _widths_by_rank(windows, lane, step, layer, rank_bits, table, place):  # type: ignore[no-untyped-def]
    """Fill ``place`` [E] with the widest index that any token of the step asks for by its rank."""
    ids = windows.expert_ids
    place[:] = table.bits.size - 1
    for slot in range(windows.n_rows.shape[1]):
        if step < windows.n_rows[lane, slot]:
            row = windows.first_row[lane, slot] + step
            for rank in range(ids.shape[2]):
                e = np.intp(ids[row, layer, rank])
                place[e] = min(place[e], table.index_of[rank_bits[rank]])


@njit(cache=True, nogil=True)
def _decide(counts, step, layer, where, cache, ranked, table, place):  # type: ignore[no-untyped-def]
    """Service "fetch": fill ``place`` [E] of one layer's active experts.

    A width index means a copy in HBM, `COPIED` + index one that is copied now.
    """
    base = layer * place.size
    for i in range(counts.n_active[step, layer]):
        x = counts.active[step, layer, i]
        e = x - base
        if where[x] >= 0:
            place[e] = where[x]
            continue
        b = place[e] if ranked else -1 - where[x]
        if cache[x] == table.bits[b] or (ranked and cache[x] > table.bits[b]):
            place[e] = table.index_of[cache[x]]
        else:
            place[e] = COPIED + b


@njit(cache=True, nogil=True, inline="always")
def _far_expert_s(n_tokens, b, table):  # type: ignore[no-untyped-def]
    rows_s = table.far_token_s[b] * max(n_tokens, table.far_min_tokens)
    return max(table.far_weight_s[b], rows_s)


@njit(cache=True, nogil=True)
def _move_busiest(counts, step, layer, where, rates, table, state, holder, place):  # type: ignore[no-untyped-def]
    """Service "balance": copy the busiest experts to the GPU, let the far device compute the rest.

    How many: those that minimise the slower side (MoNDE), or as many as a ``credit`` >= 0 per
    expert outside HBM has saved up. Fills ``place`` [E] as `_decide` does.
    """
    base = layer * place.size
    busiest = np.empty(counts.n_active[step, layer], np.int64)
    n, near_s, far_s = 0, 0.0, 0.0
    for i in range(busiest.size):
        x = counts.active[step, layer, i]
        place[x - base] = where[x]
        if where[x] >= 0:
            near_s += table.gpu_weight_s[where[x]]
            continue
        far_s += _far_expert_s(counts.tokens[step, x], -1 - where[x], table)
        k = n
        while k > 0 and counts.tokens[step, busiest[k - 1]] < counts.tokens[step, x]:
            busiest[k] = busiest[k - 1]
            k -= 1
        busiest[k] = x
        n += 1
    moved, best_s, credit = 0, max(near_s, far_s), rates[CREDIT]
    if credit >= 0.0:
        state.credit[holder] += credit * n
        moved = min(int(state.credit[holder] + 1e-12), n)
        state.credit[holder] -= moved
    else:
        for k in range(n):
            b = -1 - where[busiest[k]]
            near_s += table.copy_s[b] + table.gpu_weight_s[b]
            far_s -= _far_expert_s(counts.tokens[step, busiest[k]], b, table)
            if max(near_s, far_s) < best_s:
                moved, best_s = k + 1, max(near_s, far_s)
    for k in range(moved):
        place[busiest[k] - base] = COPIED - 1 - where[busiest[k]]


@njit(cache=True, nogil=True, inline="always")
def _serve(counts, step, layer, place, base, table, rel_mse, guarded, served, low, out, totals):  # type: ignore[no-untyped-def]
    """Compute one layer's active experts in one step where ``place[x - base]`` says.

    Returns:
        seconds of experts on the GPU, on the far device, of copies on demand; bytes of these
        copies; experts on the far device.
    """
    gpu_weights_s, far_s, copy_s = 0.0, 0.0, 0.0
    gpu_tokens, n_far, widths, hits = 0, 0, 0, 0
    copy_bytes, hbm_bytes, far_bytes = 0, 0, 0
    error, energy = 0.0, 0.0
    for i in range(counts.n_active[step, layer]):
        x = np.uint32(counts.active[step, layer, i])  # unsigned: no test for negative indices
        n_tokens, q = counts.tokens[step, x], counts.energy[step, x]
        where = int(place[x - base])
        if where < 0:
            b = np.uint32(-1 - where)
            far_s += _far_expert_s(n_tokens, b, table)
            n_far += 1
            far_bytes += table.weight_bytes[b]
            served[1, b] += n_tokens
        else:
            b = np.uint32(where)
            if where >= COPIED:
                b = np.uint32(where - COPIED)
                copy_s += table.copy_s[b]
                copy_bytes += table.weight_bytes[b]
            else:
                hits += n_tokens
            gpu_weights_s += table.gpu_weight_s[b]
            gpu_tokens += n_tokens
            widths |= 1 << int(b)
            hbm_bytes += table.weight_bytes[b]
            served[0, b] += n_tokens
        if guarded:
            low[x] += n_tokens * np.int32(table.bits[b] <= LOW_BITS)
        error += q * rel_mse[x, b]
        energy += q
    gpu_s = max(gpu_weights_s, table.gpu_token_s * gpu_tokens)
    for k in range(table.bits.size):
        if widths & (1 << k):
            gpu_s += table.gpu_launch_s[k]
    totals[HBM_BYTES] += hbm_bytes
    totals[FAR_BYTES] += far_bytes
    out[layer, HITS] += hits
    out[layer, ERROR] += error
    out[layer, ENERGY] += energy
    return gpu_s, far_s, copy_s, copy_bytes, n_far


@njit(cache=True, nogil=True, inline="always")
def _far_tokens(windows, lane, step, layer, place, first):  # type: ignore[no-untyped-def]
    """Tokens of the step with an expert on the far device: each activation travels once."""
    ids = windows.expert_ids
    n_tokens = 0
    for slot in range(windows.n_rows.shape[1]):
        if step < windows.n_rows[lane, slot]:
            row = windows.first_row[lane, slot] + step
            is_far = False
            for rank in range(ids.shape[2]):
                is_far |= place[first + np.intp(ids[row, layer, rank])] < 0
            n_tokens += int(is_far)
    return n_tokens


@njit(cache=True, nogil=True, inline="always")
def _context(windows, lane, step, sliding_window):  # type: ignore[no-untyped-def]
    """Live tokens of the step, their context, and the context seen through the sliding window."""
    n_tokens, context, sliding = 0, 0, 0
    for slot in range(windows.n_rows.shape[1]):
        if step < windows.n_rows[lane, slot]:
            n_tokens += 1
            seen = windows.context[lane, slot] + step + 1
            context += seen
            sliding += min(seen, sliding_window)
    return n_tokens, context, sliding


@njit(cache=True, nogil=True)
def _keep_fetched(counts, step, layer, place, where, service, room, table, state, lane, totals):  # type: ignore[no-untyped-def]
    """Touch hits, keep fetched copies, complete promotions that a fetch has overtaken."""
    used, capacity = room
    cache, time, uses = state.cache[lane], state.cache_time[lane], state.cache_uses[lane]
    scalars, target = state.scalars[lane], state.target[lane]
    n_scopes = 1 if service[SCOPE] == GLOBAL_SCOPE else counts.n_active.shape[1]
    scope, size = layer % n_scopes, where.size // n_scopes
    for i in range(counts.n_active[step, layer]):
        x = counts.active[step, layer, i]
        if where[x] >= 0:
            continue
        b = place[x - layer * place.size]
        is_hit = b < COPIED
        if not is_hit:
            b -= COPIED
        if target[x] != 0:  # queued: the fetched copy is the promotion, if it has its width
            if table.bits[b] == target[x]:
                state.hbm[lane, x] = target[x]
                if scalars[QUEUE_LENGTH] > 0 and state.queue[lane, 0] == x:
                    totals[OVERTAKEN] += scalars[HEAD_BYTES]
                    scalars[HEAD_BYTES] = 0
            continue
        if service[CACHE] == NO_CACHE or table.weight_bytes[b] > capacity:
            continue
        if is_hit and cache[x] == 0:  # served, but a later copy of this step pushed it out
            continue
        scalars[TICK] += 1
        if is_hit:
            uses[x] += 1
            if service[CACHE] != FIFO:
                time[x] = scalars[TICK]
            continue
        if cache[x] != 0:  # another width of the same expert gives way
            used[scope] -= _copy_bytes(table, cache[x])
            cache[x] = 0
        used[scope] = table.weight_bytes[b] + _evict(
            scope * size, scope * size + size, used[scope], capacity - table.weight_bytes[b],
            service[CACHE], table, state, lane,
        )  # fmt: skip
        cache[x], time[x], uses[x] = table.bits[b], scalars[TICK], 1


@njit(cache=True, nogil=True)
def _drop_completed(where, table, state, lane):  # type: ignore[no-untyped-def]
    """Take promotions whose copy is in HBM off the queue; they serve from the next step."""
    queue, hbm, target = state.queue[lane], state.hbm[lane], state.target[lane]
    kept = 0
    for i in range(state.scalars[lane, QUEUE_LENGTH]):
        x = queue[i]
        if hbm[x] == target[x]:
            where[x] = table.index_of[hbm[x]]
        else:
            queue[kept] = x
            kept += 1
    state.scalars[lane, QUEUE_LENGTH] = kept


@njit(cache=True, nogil=True)
def _advance_queue(n_bytes, where, table, state, lane, totals):  # type: ignore[no-untyped-def]
    """Move ``n_bytes`` of the queue's head(s); what has arrived serves from the next step."""
    queue, target, scalars = state.queue[lane], state.target[lane], state.scalars[lane]
    done, length = 0, scalars[QUEUE_LENGTH]
    while done < length and n_bytes > 0:
        x = queue[done]
        moved = min(n_bytes, _copy_bytes(table, target[x]) - scalars[HEAD_BYTES])
        n_bytes -= moved
        scalars[HEAD_BYTES] += moved
        totals[MIGRATION] += moved
        if scalars[HEAD_BYTES] == _copy_bytes(table, target[x]):
            scalars[HEAD_BYTES] = 0
            state.hbm[lane, x] = target[x]
            where[x] = table.index_of[target[x]]
            done += 1
    if done > 0:
        for i in range(length - done):
            queue[i] = queue[i + done]
        scalars[QUEUE_LENGTH] = length - done


@njit(cache=True, nogil=True, inline="always")
def _exposed_copy(copy_s, copy_bytes, rates, own_s, idle, totals):  # type: ignore[no-untyped-def]
    """Seconds by which copies on demand prolong a layer of ``own_s``, seconds they use the link.

    A share ``recall`` was predicted, with wrong ones beside it (``precision``). They fill what is
    left of the link's time in this layer and the ``depth - 1`` before it, oldest first; the layer
    waits for the rest and for what nobody predicted. ``idle`` is [layers so far, ring of seconds].
    """
    totals[FETCH] += copy_bytes
    if rates[DEPTH] <= 0.0:
        return copy_s, copy_s
    depth, n_seen = idle.size - 1, int(idle[0])
    idle[1 + n_seen % depth] = own_s
    idle[0] += 1.0
    wrong = rates[RECALL] * (1.0 / rates[PRECISION] - 1.0)
    totals[FETCH] += int(wrong * copy_bytes)
    late_s = rates[RECALL] * copy_s + wrong * copy_s
    for i in range(n_seen + 1, n_seen + 1 + depth):
        if late_s <= 0.0:
            break
        hidden_s = min(late_s, idle[1 + i % depth])
        idle[1 + i % depth] -= hidden_s
        late_s -= hidden_s
    return late_s + (1.0 - rates[RECALL]) * copy_s, copy_s + wrong * copy_s


@njit(cache=True, nogil=True, inline="always")
def _dense_layers_s(context, sliding, table):  # type: ignore[no-untyped-def]
    n_layers = table.n_dense_full + table.n_dense_sliding
    seen = table.n_dense_full * context + table.n_dense_sliding * sliding
    return n_layers * table.dense_layer_s + table.kv_token_s * seen


@njit(cache=True, nogil=True, inline="always")
def _book_seconds(layer_out, layer, layer_s, gpu_s, link_s, experts_s):  # type: ignore[no-untyped-def]
    """Add one layer's seconds in one step to its columns; stalled is what the GPU waits."""
    layer_out[layer, LAYER_S] += layer_s
    layer_out[layer, GPU_S] += gpu_s
    layer_out[layer, LINK_S] += link_s
    layer_out[layer, STALL_S] += experts_s - gpu_s


@njit(cache=True, nogil=True)
def replay_window(  # type: ignore[no-untyped-def]
    windows, lane, counts, where, service, rates, rank_bits, room, prices, state, holder, out
):  # fmt: skip
    """Stage two: run the clock over one lane's counts, into lane ``lane`` of ``out``.

    ``where[x]`` is the width index of the HBM copy, or -1 - the index served or fetched from
    elsewhere; lane ``holder`` of ``state`` has the queue and the cache, ``room`` its (used bytes
    per scope, capacity).
    """
    # arrays are taken out of their tuples once: each access in a loop would cost an atomic count
    table, rel_mse = prices.table, prices.rel_mse
    n_layers, top_k = windows.expert_ids.shape[1], windows.expert_ids.shape[2]
    kind, ranked, guarded = service[KIND], rank_bits[0] > 0, prices.guarded
    cache, layer_out, totals = state.cache[holder], out.layer[lane], out.totals[lane]
    served, low, step_s = out.served[lane], out.low_tokens[lane], out.step_s[lane]
    step_tokens, scalars = out.step_tokens[lane], state.scalars[holder]
    n_experts = where.size // n_layers
    place = where if kind == IN_PLACE else np.zeros(n_experts, np.int8)
    idle = np.zeros(1 + max(1, int(rates[DEPTH])))
    for step in range(counts.tokens.shape[0]):
        n_tokens, context, sliding = _context(windows, lane, step, table.sliding_window)
        if n_tokens == 0:
            continue
        spare_s = total_s = _dense_layers_s(context, sliding, table)
        if rates[DEPTH] < n_layers:  # only who looks a whole step ahead knows the next token's
            idle[:] = 0.0
        idle[1 + int(idle[0] - 1) % (idle.size - 1)] += total_s
        for layer in range(n_layers):
            base = layer * n_experts
            first, base = (base, 0) if kind == IN_PLACE else (0, base)
            if kind == FETCH_ALL:
                if ranked:
                    _widths_by_rank(windows, lane, step, layer, rank_bits, table, place)
                _decide(counts, step, layer, where, cache, ranked, table, place)
            elif kind == BALANCE:
                _move_busiest(counts, step, layer, where, rates, table, state, holder, place)
            gpu_s, far_s, copy_s, copy_bytes, n_far = _serve(
                counts, step, layer, place, base, table, rel_mse, guarded, served, low, layer_out,
                totals,
            )  # fmt: skip
            link_s = 0.0
            if n_far > 0:
                crossing = n_tokens
                if n_far < counts.n_active[step, layer]:
                    crossing = _far_tokens(windows, lane, step, layer, place, first)
                link_s = 2.0 * table.link_latency_s + crossing * table.activation_token_s
                totals[ACTIVATION] += crossing * table.activation_bytes
                far_s = max(table.far_floor_s, link_s + far_s)
            seen = sliding if table.layer_slides[layer] else context
            attention_s = table.layer_s[layer] + table.kv_token_s * seen
            layer_out[layer, FAR_S] += max(0.0, far_s - link_s)
            exposed_s, copying_s = _exposed_copy(
                copy_s, copy_bytes, rates, attention_s + gpu_s, idle, totals
            )
            near_s, link_s = gpu_s + exposed_s, link_s + copying_s
            experts_s = table.overlap * max(near_s, far_s)
            experts_s += (1.0 - table.overlap) * (near_s + far_s)
            total_s += attention_s + experts_s
            spare_s += attention_s + experts_s - link_s
            layer_out[layer, ROUTED] += n_tokens * top_k
            _book_seconds(layer_out, layer, attention_s + experts_s, gpu_s, link_s, experts_s)
            if kind == FETCH_ALL:
                _keep_fetched(
                    counts, step, layer, place, where, service, room, table, state, holder, totals
                )
        if kind == FETCH_ALL:
            _drop_completed(where, table, state, holder)
        if scalars[QUEUE_LENGTH] > 0:
            n_bytes = int(max(0.0, spare_s) * table.link_bytes_per_s)
            _advance_queue(n_bytes, where, table, state, holder, totals)
        rest_s = table.head_s + table.engine_base_s + table.engine_token_s * n_tokens
        idle[1 + int(idle[0] - 1) % (idle.size - 1)] += rest_s
        step_s[step], step_tokens[step] = total_s + rest_s, n_tokens
        totals[CONTEXT] += context
        totals[SLIDING] += sliding
        totals[STEPS] += 1


@njit(cache=True, nogil=True)
def _locate(state, lane, service, table, where):  # type: ignore[no-untyped-def]
    """Fill ``where``: the HBM width index, or -1 - the index served or fetched otherwise."""
    hbm, far, target = state.hbm[lane], state.far[lane], state.target[lane]
    for x in range(where.size):
        if hbm[x] != 0:
            where[x] = table.index_of[hbm[x]]
        elif service[KIND] == FETCH_ALL and target[x] != 0:
            where[x] = -1 - table.index_of[target[x]]
        else:
            where[x] = -1 - table.index_of[far[x]]


@njit(cache=True, nogil=True)
def run_lanes(first, last, windows, plans, prices, state, no_state, counts, planned, out, ref):  # type: ignore[no-untyped-def]
    """One window of lanes ``first..last-1``: plan, counts, replay and reference, in place.

    ``no_state`` is one lane of empty state, which the stateless reference reads and leaves alone;
    ``counts`` is zeroed scratch, and zeroed again afterwards.
    """
    n_layers = windows.expert_ids.shape[1]
    where = np.empty(counts.tokens.shape[1], np.int8)
    n_experts, empty = where.size // n_layers, np.int64(0)
    for lane in range(first, last):
        service = plans.services[lane]
        room = apply_plan(plans, lane, prices, n_layers, state, planned)
        count_window(windows, lane, n_experts, counts)
        _locate(state, lane, service, prices.table, where)
        replay_window(
            windows, lane, counts, where, service, plans.rates[lane], plans.rank_bits[lane], room,
            prices, state, lane, out,
        )  # fmt: skip
        replay_window(
            windows, lane, counts, prices.ref_place, prices.ref_service, prices.ref_rates,
            prices.ref_rank_bits, room, prices, no_state, empty, ref,
        )  # fmt: skip
        collect_counts(counts, planned.counts[lane], planned.gate_energy[lane])
