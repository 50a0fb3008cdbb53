"""A placement in the words of engines, with what each of them cannot say.

Formats as read in the engines' public packages (sglang 0.5.23, sglang-kt and kt-kernel 0.7.2; for
llama.cpp the option ``--override-tensor`` and the tensor names of gguf 0.19). No engine is run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.plan import FAR, HBM
from ndp_gym.plan_export import ExportedPlan

__all__ = ["TARGETS", "Target", "Written"]

_MAX_COUNT = 2**22  # engines add counts as float32, exact below 2**24


class Written(NamedTuple):
    """Content of the file, how to use it (``{out}`` is its name), what it leaves out."""

    content: str | bytes
    usage: str
    left_out: Sequence[str]


class Target(NamedTuple):
    """An engine: suffix that it insists on ("" for any), and how a plan is written for it."""

    suffix: str
    write: Callable[[ExportedPlan], Written]


def as_json(plan: ExportedPlan) -> Written:
    """Everything, as `ndp_gym.plan_export.read_plan` reads it back."""
    content = json.dumps(plan.to_dict(), allow_nan=False) + "\n"
    return Written(content, "", ())


def for_sglang(plan: ExportedPlan) -> Written:
    """``{"logical_count": [all layers, E]}``, what SGLang's EPLB starts from."""
    content = json.dumps({"logical_count": ordered_counts(plan).tolist()}) + "\n"
    return Written(
        content,
        "python -m sglang.launch_server … --init-expert-location {out}",
        [
            "tiers: SGLang keeps every expert on some GPU; the counts say which are hot (those in "
            "HBM above all others), and EPLB decides which GPU holds them and how many copies",
            f"bits: one format for all experts; {_other_width(plan)}",
            *_service_note(plan),
        ],
    )


def for_ktransformers(plan: ExportedPlan) -> Written:
    """``.pt`` of ``logical_count`` [1, all layers, E] whose highest counts are the HBM experts."""
    torch = import_module("torch")
    file = io.BytesIO()
    counts = torch.from_numpy(ordered_counts(plan)[None])
    torch.save({"logical_count": counts}, file)
    n_near, total = int((plan.placement.tier == HBM).sum()), plan.placement.tier.size
    return Written(
        file.getvalue(),
        "python -m sglang.launch_server … --kt-expert-placement-strategy frequency "
        f"--init-expert-location {{out}} --kt-gpu-experts-ratio {gpu_ratio(n_near, total)}",
        [
            f"bits: one format on the GPU and one on the CPU; {_other_width(plan, by_tier=True)}",
            "changes from window to window: the placement is fixed at the start",
            *_service_note(plan),
        ],
    )


def for_llama_cpp(plan: ExportedPlan) -> Written:
    """The argument of ``--override-tensor``: experts of whole layers to the CPU.

    Raises:
        ValueError: Layers are split between the tiers and none is whole in HBM.
    """
    far = plan.placement.tier == FAR
    whole_far, mixed = far.all(axis=1), far.any(axis=1) & ~far.all(axis=1)
    n_near = int((~far).sum())
    lost = int((~far[mixed]).sum())
    if mixed.any() and not (~far).all(axis=1).any():
        raise ValueError(
            f"llama.cpp places the experts of a layer together, and {int(mixed.sum())} of "
            f"{len(far)} layers of this plan are split between HBM and the far tier, with all "
            f"{n_near} experts in HBM: export a policy that places whole layers, such as "
            "kt_front"
        )
    numbers = "|".join(str(plan.first_layer + int(i)) for i in np.flatnonzero(whole_far | mixed))
    pattern = rf"^blk\.({numbers})\.ffn_(up|down|gate|gate_up)_exps\.=CPU" if numbers else ""
    left_out = []
    if lost:
        layers = ", ".join(str(plan.first_layer + int(i)) for i in np.flatnonzero(mixed))
        left_out.append(
            f"part of a layer: layers {layers} are split by the plan and go to the CPU whole, "
            f"with {lost} of {n_near} experts in HBM ({lost / n_near:.1%})"
        )
    left_out += [
        f"bits: a tensor of a GGUF has one type for all experts of a layer (llama-quantize "
        f"--tensor-type sets it per layer); {_other_width(plan, by_layer=True)}",
        "changes from window to window: tensors stay where they are loaded",
        *_service_note(plan),
    ]
    usage = 'llama-server -m MODEL.gguf -ngl 99 --override-tensor "$(cat {out})"'
    return Written(f"{pattern}\n" if pattern else "", usage, left_out)


TARGETS = {
    "json": Target("", as_json),
    "sglang": Target(".json", for_sglang),
    "ktransformers": Target(".pt", for_ktransformers),
    "llama-cpp": Target("", for_llama_cpp),
}


def ordered_counts(plan: ExportedPlan) -> NDArray[np.int64]:
    """[all layers, E] counts: the loads, those of HBM experts raised above every far one.

    Dense layers are rows of zeros, as engines count them. Counts stay below 2**23.
    """
    load = plan.load
    scale = (_MAX_COUNT - 1) / load.max() if load.max() > 0 else 0.0
    counts = np.rint(load * min(scale, 1e6)).astype(np.int64)
    near = plan.placement.tier == HBM
    if near.any() and not near.all():
        counts[near] += max(0, int(counts[~near].max()) + 1 - int(counts[near].min()))
    dense = np.zeros((plan.first_layer, counts.shape[1]), dtype=np.int64)
    return np.concatenate([dense, counts])


def gpu_ratio(n_near: int, total: int) -> str:
    """The shortest decimal ``r`` with ``int(total * r) == n_near``, which is what engines take."""
    if n_near == total:
        return "1.0"
    for digits in range(1, 17):
        text = f"{(n_near + 0.5) / total:.{digits}f}"
        if int(total * float(text)) == n_near:
            return text
    raise AssertionError("a double holds 15 digits")


def _other_width(plan: ExportedPlan, *, by_tier: bool = False, by_layer: bool = False) -> str:
    """How many experts have another width than most of their group, in words."""
    bits, tier = plan.placement.bitwidth, plan.placement.tier
    group = np.zeros(bits.shape, dtype=np.int64)
    if by_tier:
        group += tier
    if by_layer:
        group += np.arange(len(bits))[:, None]
    odd = sum(
        int((own := bits[group == g]).size - np.bincount(own).max()) for g in np.unique(group)
    )
    where = " on its tier" if by_tier else " in its layer" if by_layer else ""
    return (
        f"{odd} of {bits.size} experts ({odd / bits.size:.1%}) have another width than most{where}"
    )


def _service_note(plan: ExportedPlan) -> list[str]:
    """What the policy does about misses, where a placement does not hold it."""
    service = plan.facts.get("service")
    if not isinstance(service, dict) or service.get("kind") == "in_place":
        return []
    cache = (
        f" through a cache ({service['cache']})" if service.get("cache", "none") != "none" else ""
    )
    return [f"service: experts outside HBM are served by {service['kind']}{cache} at run time"]
