"""Compiled loops over lanes, layers and experts that run once per window beside the kernel.

Each does in one pass what would be dozens of small array operations: for a single lane their fixed
cost would exceed the kernel's. Experts are addressed by code ``x = layer * n_experts + expert``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# planes of `observe`'s result [6, N, X], the keys of the observation in this order
PLANES = ("last_load", "ema_load", "gate_share", "tier", "bitwidth", "in_flight")
_LAST, _EMA, _GATE, _TIER, _BITS, _FLIGHT = range(6)
_HEAD_BYTES = 1  # column of `LaneState.scalars`


@njit(cache=True, nogil=True)
def remember(  # type: ignore[no-untyped-def]
    weight, steps, counts, gate_energy, seconds, hits, routed, fetched, loads, layer, rate
):
    """Fold one window into the averages of the lanes.

    ``loads`` [3, N, L, E] are the last load, the averaged load and the averaged gate energy;
    ``seconds`` (four [N, L]) and the share of ``hits`` become ``layer`` [N, L, 5]. ``weight`` [N]
    is that of this window in the averages, ``steps`` [N, W] the live tokens of its decode steps.
    ``rate`` [N] becomes the bytes ``fetched`` per step.
    """
    last, ema, energy = loads[0], loads[1], loads[2]
    gpu_s, far_s, link_s, stall_s = seconds
    for n in range(counts.shape[0]):
        n_steps = 0
        for step in range(steps.shape[1]):
            n_steps += steps[n, step] > 0
        n_steps = max(n_steps, 1)
        rate[n] = fetched[n] / n_steps
        for i in range(counts.shape[1]):
            for e in range(counts.shape[2]):
                last[n, i, e] = counts[n, i, e] / n_steps
                ema[n, i, e] += weight[n] * (last[n, i, e] - ema[n, i, e])
                energy[n, i, e] += weight[n] * (gate_energy[n, i, e] / n_steps - energy[n, i, e])
            layer[n, i, 0] = gpu_s[n, i] / n_steps
            layer[n, i, 1] = far_s[n, i] / n_steps
            layer[n, i, 2] = link_s[n, i] / n_steps
            layer[n, i, 3] = max(stall_s[n, i], 0.0) / n_steps  # 0 may round below it
            layer[n, i, 4] = hits[n, i] / max(routed[n, i], 1)


@njit(cache=True, nogil=True)
def observe(loads, copies, bytes_of, left, tokens, n_admitted, generated, fetched, planes, context):  # type: ignore[no-untyped-def]
    """Fill ``planes`` [6, N, L, E] with what policies see of every expert.

    ``copies`` are the columns hbm, far, target and scalars of `LaneState`. ``context`` [N, 6] gets
    live and admitted requests, their mean context (``tokens`` [N, B]), tokens generated, and bytes
    that promotions still have to move.
    """
    hbm, far, target, scalars = copies
    n_lanes, n_layers, n_experts = loads.shape[1:]
    for n in range(n_lanes):
        n_bytes = -scalars[n, _HEAD_BYTES]
        for i in range(n_layers):
            total = 0.0
            for e in range(n_experts):
                total += loads[2, n, i, e]
            total = total if total > 0.0 else 1.0
            for e in range(n_experts):
                x = i * n_experts + e
                absent = hbm[n, x] == 0
                moving = target[n, x] != 0 and target[n, x] != hbm[n, x]
                if moving:
                    n_bytes += bytes_of[target[n, x]]
                planes[_LAST, n, i, e] = loads[0, n, i, e]
                planes[_EMA, n, i, e] = loads[1, n, i, e]
                planes[_GATE, n, i, e] = loads[2, n, i, e] / total
                planes[_TIER, n, i, e] = 1.0 if absent else 0.0
                planes[_BITS, n, i, e] = far[n, x] if absent else hbm[n, x]
                planes[_FLIGHT, n, i, e] = 1.0 if moving else 0.0
        n_live, n_tokens = 0, 0
        for slot in range(left.shape[1]):
            n_live += left[n, slot] > 0
            n_tokens += tokens[n, slot]
        context[n, 0], context[n, 1] = n_live, n_admitted[n]
        context[n, 2] = n_tokens / max(n_live, 1)
        context[n, 3], context[n, 4] = generated[n], n_bytes
        context[n, 5] = fetched[n]


@njit(cache=True, nogil=True)
def advance_slots(window, request, row, left, context, n_live, generated):  # type: ignore[no-untyped-def]
    """Move the live requests [N, B] one window on; free the slots of those that end in it.

    Returns:
        How many ended.
    """
    n_ended = 0
    for n in range(request.shape[0]):
        for slot in range(request.shape[1]):
            n_rows = min(left[n, slot], window)
            row[n, slot] += n_rows
            left[n, slot] -= n_rows
            context[n, slot] += n_rows
            generated[n] += n_rows
            if left[n, slot] == 0 and request[n, slot] >= 0:
                request[n, slot] = -1
                context[n, slot] = 0
                n_live[n] -= 1
                n_ended += 1
    return n_ended


@njit(cache=True, nogil=True)
def admit_slots(request, row, left, context, queue, extra_context, columns):  # type: ignore[no-untyped-def]
    """Put the requests at the head of ``queue`` into the idle slots [B] of one lane.

    ``extra_context`` tokens come before each. ``columns`` (start, n_prompt, length, context_offset)
    are those of the request table.

    Returns:
        How many; the slots are filled in order.
    """
    start, n_prompt, length, context_offset = columns
    n = 0
    for slot in range(request.size):
        if n == queue.size:
            break
        if request[slot] < 0:
            index = queue[n]
            request[slot] = index
            row[slot] = start[index] + n_prompt[index]
            left[slot] = length[index] - n_prompt[index]
            context[slot] = extra_context + context_offset[index] + n_prompt[index]
            n += 1
    return n


@njit(cache=True, nogil=True)
def add_prompts(slot_load, request, total):  # type: ignore[no-untyped-def]
    """Fill ``total`` [L, E] with the loads [B, L, E] of the slots that hold a request."""
    total[:] = 0.0
    for slot in range(request.size):
        if request[slot] >= 0:
            total += slot_load[slot]


@njit(cache=True, nogil=True)
def prefill_seconds(outside_s, link_s, gpu_s, far_s, hbm, n_layers):  # type: ignore[no-untyped-def]
    """Seconds of a prompt by `PrefillParts` and the experts [L * E] in HBM.

    Per layer, the fastest split of the absent experts between link and far device.
    """
    n_experts = hbm.size // n_layers
    seconds = 0.0
    for i in range(n_layers):
        n_resident = 0
        for e in range(n_experts):
            n_resident += hbm[i * n_experts + e] != 0
        fastest = np.inf
        for on_gpu in range(n_resident, n_experts + 1):
            busy = max(link_s[on_gpu - n_resident], gpu_s[on_gpu])
            fastest = min(fastest, max(busy, far_s[n_experts - on_gpu]))
        seconds += outside_s + fastest
    return seconds
