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
def summarise(planned, replay, reference, weights, super_codes, joules, sums, counts, layer_counts):  # type: ignore[no-untyped-def]
    """Fill ``sums`` [N, 7], ``counts`` [N, 3] and ``layer_counts`` [N, L, 2] (hits, routed).

    ``weights`` [L] are the layers' sensitivities, ``super_codes`` the super experts, ``joules``
    [N or 1, 13] the rates of `EnergyRates`.
    """
    for n in range(sums.shape[0]):
        load_s, requantise_s = planned.seconds[n, 0], planned.seconds[n, 1]
        total_s = 0.0 if load_s > 0.0 else requantise_s
        ref_s, tokens = 0.0, 0
        for step in range(replay.step_s.shape[1]):
            total_s += replay.step_s[n, step]
            ref_s += reference.step_s[n, step]
            tokens += replay.step_tokens[n, step]
        sums[n, DECODE_S], sums[n, REF_DECODE_S] = total_s, ref_s
        hits, routed = 0, 0
        relative, ref_relative = 0.0, 0.0
        for i in range(weights.size):
            layer, ref_layer = replay.layer[n, i], reference.layer[n, i]
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
            low += replay.low_tokens[n, x] / max(planned.counts[n, x], 1)
            ref_low += reference.low_tokens[n, x] / max(planned.counts[n, x], 1)
        sums[n, LOW_SHARE] = low / max(super_codes.size, 1)
        sums[n, REF_LOW_SHARE] = ref_low / max(super_codes.size, 1)
        rate = joules[n if joules.shape[0] > 1 else 0]
        energy = rate[11] * tokens + rate[12] * total_s
        for column in range(9):
            energy += rate[column] * replay.totals[n, column]
        for tier in range(2):
            for width in range(replay.served.shape[2]):
                energy += rate[9 + tier] * replay.served[n, tier, width]
        sums[n, JOULES] = energy
