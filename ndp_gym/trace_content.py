"""Checks of the rows of a routing trace: ids in range and distinct, gates finite.

It knows arrays only; which rows to check is decided in ``trace``.
"""

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


def id_dtype(n_experts: int) -> np.dtype[Any]:
    """Type of the stored ids: uint8 up to 256 experts, else uint16."""
    return np.dtype(np.uint8 if n_experts <= 256 else np.uint16)


def scan(
    name: str,
    expert_ids: npt.NDArray[Any],
    gate_weights: npt.NDArray[np.float16] | None,
    n_experts: int,
    first: int,
) -> None:
    """Raise one ``ValueError`` about the first bad value.

    Args:
        name: What to call the trace in the message.
        expert_ids: ``[n, L, K]`` unsigned.
        gate_weights: ``[n, L, K]`` or None.
        n_experts: Experts per layer.
        first: Row number of the first row, for the message.
    """
    if int(expert_ids.max()) >= n_experts:
        rule = f"expert_ids must be in 0..n_experts-1={n_experts - 1}"
        _fail(name, rule, expert_ids, expert_ids >= n_experts, first)
    ordered = np.sort(expert_ids, axis=2)
    repeated = ordered[:, :, 1:] == ordered[:, :, :-1]
    if repeated.any():
        rule = "expert_ids must be distinct within one top-k row"
        _fail(name, rule, ordered[:, :, 1:], repeated, first)
    if gate_weights is None:
        return
    good = np.isfinite(gate_weights) & (gate_weights >= 0)
    if not good.all():
        _fail(name, "gate_weights must be finite and >= 0", gate_weights, ~good, first)
    used = gate_weights.any(axis=2, keepdims=True)
    if not used.all():
        rule = "gate_weights must not all be 0 in one top-k row"
        _fail(name, rule, gate_weights, np.asarray(~used), first)


def _fail(
    name: str, rule: str, values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], first: int
) -> NoReturn:
    row, layer, rank = (int(axis[0]) for axis in np.nonzero(bad))
    got = values[row, layer, rank]
    raise ValueError(f"{name}: {rule}, got {got} in row {first + row}, layer {layer}")
