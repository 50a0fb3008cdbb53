"""Files of measured errors: what each expert of one model loses at each bitwidth.

A safetensors file with two float64 tensors, ``relative_error`` [L, E, NB] and ``stored_bits``
[NB], and one metadata key with JSON that says how they were measured. ``ndp-gym quality measure``
writes such files.
"""

import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ndp_gym.quality import QualityModel
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.trace_file import METADATA_KEY, parse_json

__all__ = ["QualityFile"]

SCHEMA = 1
FULL_BITS = 16
"""Width of the weights that were measured against: its error is 0 without being measured."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class QualityFile:
    """Relative squared weight error of every expert, measured at some bitwidths.

    Attributes:
        relative_error: [L, E, NB], ``||W^ - W||^2 / ||W||^2``, averaged over the expert's matrices.
        stored_bits: [NB] bits per weight with scales and zero points, averaged over weights.
        bits: the NB widths, widest first.
        method: quantizer, e.g. ``clip_search``.
        group: weights that share a scale, at most.
        model: name of what was measured.
        layers: number of each routed layer in the checkpoint, [L].
        sources: per weights file its ``file`` name, ``bytes`` and ``header_sha256``.

    Raises:
        ValueError: if shapes and widths do not agree, or a number is not finite or negative.
    """

    relative_error: Floats
    stored_bits: Floats
    bits: tuple[int, ...]
    method: str
    group: int
    model: str
    layers: tuple[int, ...]
    sources: tuple[dict[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        """Check shapes, widths and numbers."""
        bits, error = self.bits, self.relative_error
        if not bits or list(bits) != sorted(set(bits), reverse=True):
            raise ValueError(f"bits must be distinct and descending, got {list(bits)}")
        if error.ndim != 3 or 0 in error.shape or error.shape[2] != len(bits):
            raise ValueError(
                f"relative_error must have shape [L, E, {len(bits)}] for bits {list(bits)}, "
                f"got {list(error.shape)}"
            )
        if self.stored_bits.shape != (len(bits),):
            raise ValueError(
                f"stored_bits must have shape [{len(bits)}], got {list(self.stored_bits.shape)}"
            )
        if len(self.layers) != len(error):
            raise ValueError(f"layers must name {len(error)} layers, got {len(self.layers)}")
        for name, values in (("relative_error", error), ("stored_bits", self.stored_bits)):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name} must be finite and >= 0 everywhere")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "QualityFile":
        """Read a file of `save`.

        Raises:
            ValueError: it is no such file; names the field.
            OSError: it cannot be read.
        """
        with Path(path).open("rb"):  # the library's own message does not name the file
            pass
        try:
            with safe_open(str(path), framework="numpy") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
                names = set(file.keys())
                wanted = {"relative_error", "stored_bits"}
                facts = parse_json(text, f"{path}: metadata") if text else None
                if not isinstance(facts, dict) or facts.get("kind") != "quality" or wanted - names:
                    raise ValueError(f"{path}: not a file of ndp-gym quality measure")
                tensors = {name: file.get_tensor(name) for name in wanted}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
        if facts.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {facts.get('schema')!r}")
        try:
            return cls(
                **{name: np.asarray(t, dtype=np.float64) for name, t in tensors.items()},
                bits=tuple(int(b) for b in facts["bits"]),
                method=str(facts["method"]),
                group=int(facts["group"]),
                model=str(facts["model"]),
                layers=tuple(int(layer) for layer in facts["layers"]),
                sources=tuple(dict(source) for source in facts["sources"]),
            )
        except KeyError as error:
            raise ValueError(f"{path}: metadata must have {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name, then move it into place."""
        facts = {
            "kind": "quality",
            "schema": SCHEMA,
            "method": self.method,
            "group": self.group,
            "bits": list(self.bits),
            "model": self.model,
            "layers": list(self.layers),
            "sources": list(self.sources),
        }
        tensors = {"relative_error": self.relative_error, "stored_bits": self.stored_bits}
        contiguous = {name: np.ascontiguousarray(t, "<f8") for name, t in tensors.items()}
        _write_whole(Path(path), save(contiguous, {METADATA_KEY: json.dumps(facts)}))

    def model_for(
        self, model: MoESpec, system: SystemSpec, kappa: float = QualityModel.kappa
    ) -> QualityModel:
        """The error model of ``model`` on ``system``: the measured errors of its stored widths.

        16 bits are the weights as they were measured, with error 0.

        Raises:
            ValueError: the file has other layers or experts, or lacks a stored width.
        """
        measured, expected = self.relative_error.shape[:2], (model.n_layers, model.n_experts)
        if measured != expected:
            raise ValueError(
                f"measured errors of {self.model!r} are of {measured[0]} layers x {measured[1]} "
                f"experts, model {model.name!r} has {expected[0]} x {expected[1]}"
            )
        columns = {bits: self.relative_error[:, :, i] for i, bits in enumerate(self.bits)}
        columns.setdefault(FULL_BITS, np.zeros(expected))
        missing = [bits for bits in system.stored_bits if bits not in columns]
        if missing:
            raise ValueError(
                f"measured errors of {self.model!r} lack {_listed(missing)} bit, which system "
                f"{system.name!r} stores: they have {_listed(self.bits)} (quality measure --bits)"
            )
        table = np.stack([columns[bits] for bits in system.stored_bits], axis=2)
        return QualityModel(kappa, table)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then move it into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _listed(values: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
