"""What must fit where: KV cache, HBM budget for experts, stored replicas."""

import numpy as np
import numpy.typing as npt

from ndp_gym.cost.decode import expert_bytes, layer_contexts
from ndp_gym.specs import MoESpec, SystemSpec


def kv_bytes(model: MoESpec, context_tokens: npt.ArrayLike) -> int:
    """Bytes of KV cache of requests with the given context lengths ([B] or one), all layers.

    Sliding layers keep ``min(S, sliding_window)`` tokens. 16-bit KV.
    """
    return (
        round(float(layer_contexts(model, context_tokens).sum())) * model.kv_bytes_per_token_layer
    )


def auto_budget_bytes(
    model: MoESpec, system: SystemSpec, contexts: npt.ArrayLike, window: int
) -> int:
    """HBM bytes left for experts: capacity - dense weights - reserve - KV after ``window`` tokens.

    Args:
        model: the model.
        system: supplies HBM capacity and runtime reserve.
        contexts: context tokens of each live request, [B].
        window: tokens that every live request is assumed to generate.

    Raises:
        ValueError: if KV and dense weights do not fit.
    """
    grown = np.atleast_1d(np.asarray(contexts, dtype=np.int64)) + window
    cache = kv_bytes(model, grown)
    left = system.gpu.memory_bytes - model.dense_bytes - system.reserve_bytes - cache
    if left < 0:
        raise ValueError(
            f"KV cache must fit in HBM beside the dense weights of {model.name!r} on "
            f"{system.name!r}: {cache} B of KV + {model.dense_bytes} B dense + "
            f"{system.reserve_bytes} B reserve exceed {system.gpu.memory_bytes} B"
        )
    return left


def stored_bytes(model: MoESpec, system: SystemSpec) -> int:
    """Bytes of all replicas on the far device (the widest only, where it requantises)."""
    widths = system.stored_bits[:1] if system.requantise else system.stored_bits
    replica = sum(expert_bytes(model, system.format, width) for width in widths)
    return replica * model.n_layers * model.n_experts


def check_capacity(model: MoESpec, system: SystemSpec) -> None:
    """Raise ``ValueError`` if the dense weights exceed HBM or the replicas exceed far memory."""
    need = stored_bytes(model, system)
    if need > system.far.memory_bytes:
        raise ValueError(
            f"stored_bits={system.stored_bits} of {model.name!r} need {need} B "
            f"({need / 1e9:.0f} GB) on far device {system.far.name!r}, which holds "
            f"{system.far.memory_bytes} B ({system.far.memory_bytes / 1e9:.0f} GB); "
            f"store fewer widths or use a larger device"
        )
    fixed = model.dense_bytes + system.reserve_bytes
    if fixed > system.gpu.memory_bytes:
        raise ValueError(
            f"dense weights of {model.name!r} and the reserve need {fixed} B on gpu "
            f"{system.gpu.name!r}, which holds {system.gpu.memory_bytes} B"
        )
