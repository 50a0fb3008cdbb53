"""Compiled loops of the ``scores`` encoding: priorities to keys, ranked experts to a plan.

Experts are addressed by code ``x = layer * n_experts + expert``. Between the two loops the keys of
every lane are sorted.
"""

from __future__ import annotations

from numba import njit

FILL, HBM_WIDTH, FAR_WIDTH, KEEP = range(4)
"""Allocation levels behind the priorities in an action."""
CODE_BITS = 20
_STEPS = 2**40  # steps per unit of priority that the ranking tells apart
_SNAP = 1e-4  # a level this close to a stored width means just that one


@njit(cache=True, nogil=True)
def unit(level):  # type: ignore[no-untyped-def]
    """[-1, 1] -> [0, 1]; what lies outside is clipped."""
    return 0.5 + 0.5 * min(max(level, -1.0), 1.0)


@njit(cache=True, nogil=True)
def rank_keys(actions, target, order, keys):  # type: ignore[no-untyped-def]
    """Fill ``order`` [N, X] with priorities and ``keys`` with integers that sort best first.

    Ties go to the smaller code.

    Returns:
        Whether every number of ``actions`` is finite.
    """
    finite = True
    n_experts = order.shape[1]
    for n in range(order.shape[0]):
        for i in range(actions.shape[1]):
            finite = finite and abs(actions[n, i]) < 1e38
        if not finite:
            break
        keep = unit(actions[n, n_experts + KEEP])
        for x in range(n_experts):
            priority = 2.0 * unit(actions[n, x]) - 1.0
            if target[n, x] != 0:
                priority += keep
            order[n, x] = priority
            keys[n, x] = (int(-priority * _STEPS) << CODE_BITS) | x
    return finite


@njit(cache=True, nogil=True)
def split_width(level, n_widths):  # type: ignore[no-untyped-def]
    """Two neighbouring width indices (wider, narrower) and the share that gets the wider one."""
    position = unit(level) * (n_widths - 1)
    if abs(position - round(position)) < _SNAP:
        position = float(round(position))
    steps = int(position)
    narrow = n_widths - 1 - steps
    return max(narrow - 1, 0), narrow, position - steps


@njit(cache=True, nogil=True)
def allocate(actions, keys, hbm, budgets, widths, weight_bytes, index_of, tier, bits):  # type: ignore[no-untyped-def]
    """Fill ``tier`` and ``bits`` [N, X]: in order of rank, whatever fits the budget goes to HBM.

    Bytes are charged as `transition` does: a copy that changes width counts at the larger one.
    The first bytes are spent on the wider, the rest on the narrower of two widths; the experts
    left over are split the same way, by number. ``widths``, ``weight_bytes`` and ``index_of`` are
    those of `CostTable`.
    """
    n_experts, n_widths = keys.shape[1], widths.size
    for n in range(keys.shape[0]):
        levels = actions[n, n_experts:]
        wide, narrow, share = split_width(levels[HBM_WIDTH], n_widths)
        room = int(unit(levels[FILL]) * budgets[n])
        wide_room = int(share * room)
        used, n_far = 0, 0
        for rank in range(n_experts):
            x = keys[n, rank] & ((1 << CODE_BITS) - 1)
            held = weight_bytes[index_of[hbm[n, x]]] if hbm[n, x] != 0 else 0
            charge = max(weight_bytes[wide], held)
            index = wide
            if used + charge > wide_room:
                charge = max(weight_bytes[narrow], held)
                index = narrow
            if used + charge <= room:
                used += charge
                tier[n, x] = 0
                bits[n, x] = widths[index]
            else:
                keys[n, n_far] = x
                n_far += 1
        wide, narrow, share = split_width(levels[FAR_WIDTH], n_widths)
        n_wide = int(share * n_far + 0.5)
        for rank in range(n_far):
            x = keys[n, rank]
            tier[n, x] = 1
            bits[n, x] = widths[wide if rank < n_wide else narrow]
