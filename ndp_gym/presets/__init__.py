"""Named models, devices, formats and systems: data in TOML beside this file, sources included.

Each row has a ``source``; fields listed in its ``assumed`` were recalled or guessed. A row of
``systems.toml`` names its GPU, link, far device and format.
"""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ndp_gym.specs import (
    GQA,
    MLA,
    FarSpec,
    Format,
    GpuSpec,
    LinkSpec,
    MoEKernel,
    MoESpec,
    SystemSpec,
)

KINDS = ("gpus", "links", "far", "models", "systems", "formats")


@functools.cache
def _rows(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """The parsed TOML file of one kind; rows must not be changed."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    text = resources.files(__name__).joinpath(f"{kind}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def names(kind: str) -> list[str]:
    """Names of all presets of ``kind``, one of :data:`KINDS`, in file order."""
    return list(_rows(kind))


def _row(kind: str, name: str) -> dict[str, Any]:
    """A copy of one row with its name, ``assumed`` as a tuple.

    Raises:
        ValueError: for an unknown name, with near matches.
    """
    rows = _rows(kind)
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.4) or list(rows)
        label = kind.removesuffix("s")
        raise ValueError(f"unknown {label} preset {name!r}; did you mean: {', '.join(near)}?")
    row: dict[str, Any] = {"name": name, **rows[name]}
    row["assumed"] = tuple(row.get("assumed", ()))
    return row


def _by_bits(table: Mapping[str, Any]) -> dict[int, Any]:
    return {int(bits): value for bits, value in table.items()}


@functools.cache
def fmt(name: str) -> Format:
    """The weight format ``name``."""
    row = _row("formats", name)
    for field in ("bits_per_weight", "rel_mse", "kernel"):
        row[field] = _by_bits(row[field])
    return Format(**row)


@functools.cache
def gpu(name: str) -> GpuSpec:
    """The GPU ``name``."""
    row = _row("gpus", name)
    row["moe_kernels"] = {k: MoEKernel(*pair) for k, pair in row["moe_kernels"].items()}
    return GpuSpec(**row)


@functools.cache
def link(name: str) -> LinkSpec:
    """The link ``name``."""
    return LinkSpec(**_row("links", name))


@functools.cache
def far(name: str) -> FarSpec:
    """The far device ``name``."""
    return FarSpec(**_row("far", name))


@functools.cache
def model(name: str) -> MoESpec:
    """The model ``name``."""
    row = _row("models", name)
    attention = dict(row["attention"])
    row["attention"] = MLA(**attention) if "kv_lora_rank" in attention else GQA(**attention)
    for field in ("gate_profile", "layer_weights"):
        if field in row:
            row[field] = tuple(row[field])
    row["super_experts"] = tuple((pair[0], pair[1]) for pair in row.get("super_experts", ()))
    return MoESpec(**row)


@functools.cache
def system(name: str) -> SystemSpec:
    """The system ``name`` with its GPU, link, far device and format."""
    row = _row("systems", name)
    row["gpu"] = gpu(row["gpu"])
    row["link"] = link(row["link"])
    row["far"] = far(row["far"])
    row["format"] = fmt(row["format"])
    row["stored_bits"] = tuple(row["stored_bits"])
    return SystemSpec(**row)
