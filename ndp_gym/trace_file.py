"""The container of a routing trace: a safetensors file read by memory map, written atomically.

It knows tensors and one JSON text, nothing of what they mean. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

METADATA_KEY = "ndp_gym"
MAX_HEADER_BYTES = 16 * 2**20

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "I64": np.int64}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
Tensor = npt.NDArray[Any]


def parse_json(text: str | bytes, name: str) -> Any:
    """The parsed JSON; NaN, double keys and deep nesting are a ``ValueError`` naming ``name``."""

    def reject(constant: str) -> None:
        raise ValueError(f"holds the constant {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("holds the same key twice in one object")
        return result

    try:
        return json.loads(text, parse_constant=reject, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{name}: JSON is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not valid JSON: {str(error)[:200]}") from None


def serialise_header(tensors: Mapping[str, Tensor], metadata: str) -> bytes:
    """Length word and JSON header, padded to 8 bytes; the tensors follow in the order given."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path: Path, tensors: Mapping[str, Tensor], metadata: str) -> None:
    """Write the file under a temporary name beside ``path``, then move it into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(serialise_header(tensors, metadata))
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def content_sha256(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """Hex sha256 of the file that ``write`` would write."""
    digest = hashlib.sha256(serialise_header(tensors, metadata))
    for tensor in tensors.values():
        digest.update(np.ascontiguousarray(tensor).data.cast("B"))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Memory-mapped read-only tensors by name, and the JSON text of the metadata key.

    Reads the header only, whatever the size of the file.

    Raises:
        ValueError: The file is not a safetensors file as ``write`` makes them; names the field.
        OSError: It cannot be opened.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: not a safetensors file: {size} bytes is too short")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path}: not a safetensors file, or a truncated one: header length must be "
                f"at most {min(MAX_HEADER_BYTES, size - 8)}, got {length}"
            )
        header = parse_json(file.read(length), f"{path}: header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{path}: header has no metadata key {METADATA_KEY!r}: not a routing trace"
        )
    return _map_tensors(path, header, 8 + length, size), text


def _map_tensors(path: Path, header: dict[str, Any], base: int, size: int) -> dict[str, Tensor]:
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    expected = 0
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        n_bytes = math.prod(shape) * dtype.itemsize
        if begin != expected or end - begin != n_bytes:
            raise ValueError(
                f"{path}: {name}.data_offsets must be [{expected}, {expected + n_bytes}] "
                f"for {dtype} {list(shape)}, got [{begin}, {end}]"
            )
        if base + end > size:
            raise ValueError(
                f"{path}: truncated: {name} ends at byte {base + end}, the file has {size}"
            )
        if (base + begin) % dtype.itemsize:
            raise ValueError(
                f"{path}: {name} must be aligned to {dtype.itemsize} bytes, got {base + begin}"
            )
        expected = end
        if n_bytes == 0:
            raise ValueError(f"{path}: {name}.shape must not hold a 0, got {list(shape)}")
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=base + begin, shape=shape)
        tensors[name] = mapped.view(np.ndarray)
    if base + expected != size:
        raise ValueError(
            f"{path}: must end at byte {base + expected} after its last tensor, has {size} bytes"
        )
    return tensors


def _entry(path: Path, name: str, entry: object) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{path}: header entry {name!r:.80} must hold dtype, shape and data_offsets, "
            f"got {entry!r:.80}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{path}: {name}.dtype must be one of {sorted(_DTYPES)}, got {dtype!r:.80}"
        )
    if not _naturals(shape) or len(shape) > 4:
        raise ValueError(
            f"{path}: {name}.shape must be up to 4 numbers in 0..2**48, got {shape!r:.80}"
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{path}: {name}.data_offsets must be two numbers in 0..2**48, got {offsets!r:.80}"
        )
    return np.dtype(_DTYPES[dtype]), tuple(shape), offsets[0], offsets[1]


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= 2**48 for value in values
    )
