"""HBM bytes for expert weights: a number, a share of the model, or what KV leaves over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ndp_gym.cost import auto_budget_bytes, check_capacity, kv_bytes
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.trace import RoutingTrace

HbmBudget = int | float | str
"""Bytes (int), share of all routed-expert bytes at 16 bit (float in (0, 1]), or ``"auto"``."""


def fixed_budget_bytes(hbm_budget: HbmBudget, model: MoESpec) -> int | None:
    """Bytes of an explicit budget, ``None`` for ``"auto"``.

    Raises:
        ValueError: neither bytes, share nor ``"auto"``.
    """
    if isinstance(hbm_budget, str) and hbm_budget == "auto":
        return None
    if isinstance(hbm_budget, float | np.floating):
        if not 0 < hbm_budget <= 1:
            raise ValueError(
                f"hbm_budget as a float is a share in (0, 1] (bytes are an int), got {hbm_budget}"
            )
        return int(float(hbm_budget) * model.routed_bytes16)
    if isinstance(hbm_budget, bool) or not isinstance(hbm_budget, int | np.integer):
        raise ValueError(
            f"hbm_budget must be bytes, a share in (0, 1] or 'auto', got {hbm_budget!r}"
        )
    if hbm_budget < 0:
        raise ValueError(f"hbm_budget must be >= 0 bytes, got {hbm_budget}")
    return int(hbm_budget)


def check_fits(
    trace: RoutingTrace,
    model: MoESpec,
    system: SystemSpec,
    hbm_budget: HbmBudget,
    batch_size: int,
    extra_context: int = 0,
) -> None:
    """Raise ``ValueError`` where replicas, or KV at its largest beside the budget, do not fit.

    The largest KV is that of the ``batch_size`` longest recorded requests at their last token,
    each with ``extra_context`` more tokens before its own.
    """
    check_capacity(model, system)
    lengths = np.sort(trace.requests.context_offset + trace.requests.length)[-batch_size:]
    lengths = lengths + extra_context
    left = auto_budget_bytes(model, system, lengths, 0)
    fixed = fixed_budget_bytes(hbm_budget, model)
    if fixed is not None and fixed > left:
        raise ValueError(
            f"hbm_budget of {fixed} B must fit in HBM of {system.name!r} beside dense weights, "
            f"reserve and {kv_bytes(model, lengths)} B of KV ({batch_size} requests of up to "
            f"{lengths.max()} tokens): at most {left} B"
        )


def auto_budgets_bytes(
    model: MoESpec, system: SystemSpec, contexts: NDArray[np.int64], window: int
) -> NDArray[np.int64]:
    """[N] ``"auto"`` budgets of lanes whose live requests have ``contexts`` [N, B] (0 = idle slot).

    `auto_budget_bytes` for many lanes at once. It leaves room for ``window`` more tokens of every
    live request, so it shrinks as contexts grow; 0 where that room is not there.
    """
    grown = np.where(contexts > 0, contexts + window, 0)
    n_sliding = sum(model.sliding_layers)
    kept = grown.sum(axis=1) * (model.n_all_layers - n_sliding)
    if n_sliding:
        kept = kept + np.minimum(grown, model.sliding_window).sum(axis=1) * n_sliding
    room = system.gpu.memory_bytes - model.dense_bytes - system.reserve_bytes
    left: NDArray[np.int64] = np.maximum(room - kept * model.kv_bytes_per_token_layer, 0)
    return left
