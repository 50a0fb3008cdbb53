"""Popularity of experts from a file: what an engine counts where it does not record choices.

An aggregate cannot be replayed, but it says which experts are hot. Read are importance matrices of
llama.cpp (GGUF), counts of SGLang's recorder (``.pt`` of modes stat and per_pass, or JSON),
``.npy`` [L, E] and recordings (docs/traces.md).
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers import gguf, npy_file, torch_file
from ndp_gym.importers.source import Source, numbers, open_source
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_counts import all_counts, train_profile

FloatArray = npt.NDArray[np.float64]
_COUNTS = re.compile(r"blk\.(\d{1,6})\.ffn_(up|gate|gate_up|down)_exps\.weight\.counts")
_TRAIN, _ALL_ROWS = "train split of a recording", "all rows of a recording"


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """Expected tokens per expert and routed token.

    Attributes:
        load: [L, E]; every layer sums to K.
        kind: What it was made from.
        source: The file, or "array".
        sha256: Hex digest of the file's content, or of the array.
    """

    load: FloatArray
    kind: str
    source: str
    sha256: str

    def facts(self) -> dict[str, Any]:
        """What provenance keeps of it."""
        shape = list(self.load.shape)
        return {"source": self.source, "kind": self.kind, "sha256": self.sha256, "shape": shape}


ProfileLike = str | os.PathLike[str] | npt.ArrayLike | Profile


def load_profile(profile: ProfileLike, model: MoESpec) -> Profile:
    """The popularity profile in a file or array, for ``model``.

    Layers that are dense in the model may be there as rows of zeros, as engines count them.

    Raises:
        ValueError: Unknown or damaged content, another shape than the model's, a layer without
            counts; one sentence naming the file.
        OSError: It cannot be read.
    """
    if isinstance(profile, Profile):
        return _profile(profile.load, model, profile.source, profile.kind, profile.sha256)
    if not isinstance(profile, str | os.PathLike):
        array = np.asarray(profile)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return _profile(array, model, "profile", "array", digest)
    path = Path(profile)
    with path.open("rb") as file:
        head = file.read(9)
    if b"\0" in head[:8] and head[8:] == b"{":  # safetensors: a length, then JSON
        trace = RoutingTrace.open(path)
        train = train_profile(trace)
        counts = all_counts(trace) if train is None else train
        kind = _ALL_ROWS if train is None else _TRAIN
        return _profile(counts, model, str(path), kind, trace.sha256)
    source = open_source(path)
    counts, kind = _counts(source)
    return _profile(counts, model, str(path), kind, source.sha256)


def profile_for(
    profile: ProfileLike | None, trace: RoutingTrace, model: MoESpec
) -> tuple[FloatArray | None, dict[str, Any] | None]:
    """The profile [L, E] of a run on ``trace``, and the facts of one that was given.

    ``None`` for ``profile`` is the train split's, where there is one, and has no facts.

    Raises:
        ValueError: See `load_profile`; or it was counted on the rows that are evaluated.
    """
    if profile is None:
        return train_profile(trace), None
    loaded = load_profile(profile, model)
    check_unseen(loaded, trace)
    return loaded.load, loaded.facts()


def check_unseen(profile: Profile, trace: RoutingTrace) -> None:
    """Raise ``ValueError`` where the profile was counted on the rows that are evaluated."""
    if profile.kind == _ALL_ROWS and profile.sha256 == trace.sha256:
        raise ValueError(
            f"{profile.source}: a profile must not be counted on the rows that are evaluated, and "
            f"this recording has no train split: give another one, or counts"
        )


def _counts(source: Source) -> tuple[npt.NDArray[Any], str]:
    """Counts [layers, E] as the file has them, and what it is."""
    if source.data.startswith(gguf.MAGIC):
        return _imatrix(source), "llama.cpp imatrix"
    if source.data.startswith(npy_file.MAGIC):
        return npy_file.layout(source.data, str(source.path)).array(), "npy"
    if source.data.startswith(torch_file.MAGIC):
        return _recorder(source), "SGLang recorder"
    if source.data.lstrip()[:1] == b"{":
        content = source.json
        if "logical_count" in content:
            value, name = content["logical_count"], f"{source.path}: logical_count"
            n_dims = 3 if _depth(value) == 3 else 2
            counts = numbers(value, n_dims, name, {int, float})
            return _summed(counts), "SGLang counts"
    raise source.fail(
        f"must be an imatrix GGUF, SGLang counts (.pt, or JSON with logical_count), a .npy of "
        f"[layers, experts] or a recording, starts with {source.data[:16]!r}"
    )


def _depth(value: object) -> int:
    """Lists around the first number, at most 4."""
    depth = 0
    while isinstance(value, list) and value and depth < 4:
        depth, value = depth + 1, value[0]
    return depth


def _imatrix(source: Source) -> FloatArray:
    """Counts [routed layers, E] of the first of a layer's expert tensors that is there."""
    tensors = gguf.float_tensors(source, lambda name: _COUNTS.fullmatch(name) is not None)
    layers: dict[int, FloatArray] = {}
    for kind in ("up", "gate", "gate_up", "down"):  # all of a layer see the same tokens
        for name, counts in tensors.items():
            match = _COUNTS.fullmatch(name)
            if match and match[2] == kind:
                layers.setdefault(int(match[1]), counts.astype(np.float64))
    if not layers:
        raise source.fail(
            "must hold tensors blk.N.ffn_*_exps.weight.counts, as llama.cpp's imatrix writes them "
            "of a MoE model in GGUF, got none"
        )
    if len({counts.size for counts in layers.values()}) > 1:
        sizes = sorted({counts.size for counts in layers.values()})
        raise source.fail(f"counts must have the same number of experts in all layers, got {sizes}")
    return np.stack([layers[number] for number in sorted(layers)])


def _recorder(source: Source) -> npt.NDArray[Any]:
    """Counts [all layers, E] of a ``.pt`` of SGLang's recorder, all steps summed."""
    content = torch_file.load(source)
    limit, where = len(source.data), str(source.path)
    if not isinstance(content, Mapping):
        raise source.fail(f"must hold a dict, got {type(content).__name__}")
    if "logical_count" in content:
        value = content["logical_count"]
        n_dims = 2 if getattr(value, "ndim", 3) == 2 else 3
        return _summed(torch_file.array(value, n_dims, limit, f"{where}: logical_count"))
    records = content.get("records")
    if not isinstance(records, list) or not all(isinstance(r, Mapping) for r in records):
        raise source.fail("must hold logical_count, or a list of records")
    name = f"{where}: last_physical_to_logical_map"
    table = torch_file.array(content.get("last_physical_to_logical_map"), 2, limit, name)
    if table.min() < 0 or table.max() >= min(2**16, limit):
        raise ValueError(f"{name} must hold ids in 0..65535, got {table.min()}..{table.max()}")
    physical = np.zeros(table.shape)
    for index, record in enumerate(records):
        name = f"{where}: record {index}: global_physical_count"
        counts = torch_file.array(record.get("global_physical_count"), 2, limit, name)
        limit -= counts.size  # records may name one tensor twice
        if counts.shape != table.shape:
            raise ValueError(f"{name} must be {list(table.shape)}, got {list(counts.shape)}")
        physical += counts
    logical = np.zeros((len(table), int(table.max()) + 1))
    np.add.at(logical, (np.arange(len(table))[:, None], table), physical)
    return logical


def _summed(counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Counts [layers, E] of [layers, E] or [steps, layers, E]."""
    with np.errstate(over="ignore"):  # infinite counts are refused with the others
        return counts if counts.ndim == 2 else counts.astype(np.float64).sum(axis=0)


def _profile(
    counts: npt.NDArray[Any], model: MoESpec, source: str, kind: str, sha256: str
) -> Profile:
    """The counts as shares of K per layer, checked against the model."""
    expected = (model.n_layers, model.n_experts)
    if counts.dtype.kind not in "iuf" or counts.ndim != 2:
        raise ValueError(
            f"{source}: a profile must be numbers [n_layers, n_experts], "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    load = counts.astype(np.float64)
    n_dense = model.n_all_layers - model.n_layers
    if load.shape == (model.n_all_layers, model.n_experts) and not load[:n_dense].any():
        load = load[n_dense:]
    if load.shape != expected:
        raise ValueError(
            f"{source}: a profile for {model.name} must be [n_layers, n_experts] = "
            f"{list(expected)} (or have a row of zeros for each of {n_dense} dense layers), "
            f"got {list(load.shape)}"
        )
    if not np.isfinite(load).all() or load.min() < 0:
        raise ValueError(f"{source}: counts must be finite and >= 0, got {load.min()}")
    with np.errstate(over="ignore"):  # said below
        total = load.sum(axis=1, keepdims=True)
    if not (np.isfinite(total).all() and total.min() > 0):
        layer = int(np.argmin(total))
        raise ValueError(
            f"{source}: every routed layer must have counts, got {total[layer, 0]:g} in layer "
            f"{layer}"
        )
    load = load / total * model.top_k
    load.flags.writeable = False
    return Profile(load=load, kind=kind, source=source, sha256=sha256)
