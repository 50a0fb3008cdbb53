"""A compiled loop of `ndp_gym.fillings`: what each expert costs outside HBM."""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def far_seconds(load, active, weight_s, token_s, least_tokens, fetch_s, seconds):  # type: ignore[no-untyped-def]
    """Fill ``seconds`` [L, NB, E], see `ndp_gym.fillings.far_seconds`.

    ``fetch_s`` [NB] are those of an expert that is copied and read; negative where none is.
    """
    n_layers, nb, n_experts = seconds.shape
    for layer in range(n_layers):
        for b in range(nb):
            for e in range(n_experts):
                tokens = max(load[layer, e] / max(active[layer, e], 1e-12), least_tokens)
                here_s = max(weight_s[b], tokens * token_s[b])
                one_s = here_s if fetch_s[b] < 0 else fetch_s[b]
                seconds[layer, b, e] = active[layer, e] * one_s
