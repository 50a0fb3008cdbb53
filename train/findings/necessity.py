"""From which HBM budget on no placement is needed, and how much of a model a whole GPU holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ndp_gym.cost import auto_budget_bytes
from ndp_gym.evaluation import evaluate
from ndp_gym.results import Row
from train.findings.measure import BUDGETS, HBM_ROWS, SYSTEMS, WINDOW, task_of, within

SYSTEM = SYSTEMS[0]
BATCH_SIZE, CONTEXT = 4, 4096
SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
WINDOWS = 16
POLICIES = (
    "balance",
    *(f"balance:price={price}" for price in (0.25, 0.5, 2)),
    *("ema", "ema:far_bits=3", "ema:bits=3", "ema:bits=3,far_bits=3"),
)


@dataclass(frozen=True, kw_only=True)
class Necessity:
    """What share of a recording's experts must fit in HBM for placement to be pointless.

    Shares are of all routed experts at 16 bit.

    Attributes:
        title: of the recording.
        batch_size: slots.
        gpu_share: what the GPU has left for experts beside dense weights and KV cache.
        enough: by quality budget, the smallest share of `SHARES` at which the fastest row within
            it has all experts in HBM (or serves 99 % from there, which some policies learn to do
            by themselves); ``None`` where that is at none that fits.
    """

    title: str
    batch_size: int
    gpu_share: float
    enough: dict[float, float | None]


def necessity(title: str, path: Path, batch_size: int) -> Necessity:
    """Scan `SHARES` on `SYSTEM`."""
    task = task_of(path, SYSTEM, batch_size, WINDOWS)
    left = auto_budget_bytes(task.model, task.system, np.full(batch_size, CONTEXT), WINDOW)
    gpu_share = left / task.model.routed_bytes16
    enough: dict[float, float | None] = dict.fromkeys(BUDGETS)
    for share in (share for share in SHARES if share <= gpu_share):
        rows = evaluate(
            POLICIES,
            task.trace,
            task.model,
            task.system,
            batch_sizes=(batch_size,),
            window=WINDOW,
            hbm_budget=share,
            max_windows=WINDOWS,
        ).rows
        for budget in BUDGETS:
            good = within(rows, budget)
            if enough[budget] is None and good and _needs_no_far_device(good[0]):
                enough[budget] = share
    return Necessity(title=title, batch_size=batch_size, gpu_share=gpu_share, enough=enough)


def _needs_no_far_device(row: Row) -> bool:
    return row["policy"] in HBM_ROWS or (row["hit_rate"] or 0.0) >= 0.99
