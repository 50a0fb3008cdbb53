"""Compiled sums over what the kernel recorded of N windows, one pass instead of many small ones.

They say nothing new: each is the sum that its name and `ndp_gym.quality.delta_nll` define.
"""

from __future__ import annotations

from numba import njit

# columns of `Replay.layer`, see `ndp_gym.kernel`
_HITS, _ROUTED, _ERROR, _ENERGY = 5, 6, 7, 8
# columns of the sums [N, 7] and [N, 3]
DECODE_S, REF_DECODE_S, RELATIVE, REF_RELATIVE, LOW_SHARE, REF_LOW_SHARE, JOULES = range(7)
TOKENS, HITS, ROUTED = range(3)


@njit(cache=True, nogil=True)
def summarise(planned, replay, reference, model, joules, sums, counts, layer_counts):  # type: ignore[no-untyped-def]
    """Fill ``sums`` [N, 7], ``counts`` [N, 3] and ``layer_counts`` [N, L, 2] (hits, routed).

    Arrays come in plain tuples, as compiled code on disk would outlive the names of others:
    ``planned`` (seconds, counts); ``replay`` (step_s, layer, low_tokens, step_tokens, served,
    totals) and ``reference`` (the first three); ``model`` (the layers' sensitivities [L], codes of
    the super experts). ``joules`` [N or 1, 13] are the rates of `energy_rates`.
    """
    seconds, expert_counts = planned
    step_s, layers, low_tokens, step_tokens, served, totals = replay
    ref_step_s, ref_layers, ref_low_tokens = reference
    weights, super_codes = model
    for n in range(sums.shape[0]):
        total_s = 0.0 if seconds[n, 0] > 0.0 else seconds[n, 1]
        ref_s, tokens = 0.0, 0
        for step in range(step_s.shape[1]):
            total_s += step_s[n, step]
            ref_s += ref_step_s[n, step]
            tokens += step_tokens[n, step]
        sums[n, DECODE_S], sums[n, REF_DECODE_S] = total_s, ref_s
        hits, routed = 0, 0
        relative, ref_relative = 0.0, 0.0
        for i in range(weights.size):
            layer, ref_layer = layers[n, i], ref_layers[n, i]
            layer_counts[n, i, 0], layer_counts[n, i, 1] = int(layer[_HITS]), int(layer[_ROUTED])
            hits += layer_counts[n, i, 0]
            routed += layer_counts[n, i, 1]
            if layer[_ENERGY] > 0.0:
                relative += weights[i] * layer[_ERROR] / layer[_ENERGY]
                ref_relative += weights[i] * ref_layer[_ERROR] / ref_layer[_ENERGY]
        sums[n, RELATIVE], sums[n, REF_RELATIVE] = relative, ref_relative
        counts[n, TOKENS], counts[n, HITS], counts[n, ROUTED] = tokens, hits, routed
        low, ref_low = 0.0, 0.0
        for x in super_codes:
            low += low_tokens[n, x] / max(expert_counts[n, x], 1)
            ref_low += ref_low_tokens[n, x] / max(expert_counts[n, x], 1)
        sums[n, LOW_SHARE] = low / max(super_codes.size, 1)
        sums[n, REF_LOW_SHARE] = ref_low / max(super_codes.size, 1)
        rate = joules[n if joules.shape[0] > 1 else 0]
        energy = rate[11] * tokens + rate[12] * total_s
        for column in range(9):
            energy += rate[column] * totals[n, column]
        for tier in range(2):
            for width in range(served.shape[2]):
                energy += rate[9 + tier] * served[n, tier, width]
        sums[n, JOULES] = energy
