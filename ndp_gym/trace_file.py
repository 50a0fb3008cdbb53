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
Layout = tuple[np.dtype[Any], tuple[int, ...]]


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
    return _header({name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata)


def _header(layout: Mapping[str, Layout], metadata: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Writer:
    """Writes a file in pieces, tensors in any order, and moves it into place when it is whole.

    Used as a context: the file appears at ``path`` when the block ends without an error and every
    tensor was filled. Memory does not grow with the size of the tensors.
    """

    def __init__(self, path: Path, layout: Mapping[str, Layout], metadata: str) -> None:
        """Prepare a file of ``layout`` (type and shape by name, in file order) at ``path``."""
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._layout = {name: (np.dtype(d), tuple(shape)) for name, (d, shape) in layout.items()}
        self._head = _header(self._layout, metadata)
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        offset = len(self._head)
        for name, (dtype, shape) in self._layout.items():
            self._next[name] = offset
            offset += math.prod(shape) * dtype.itemsize
            self._end[name] = offset

    def __enter__(self) -> "Writer":
        """Create the temporary file beside ``path`` and write the header."""
        self._file = self._temporary.open("xb")
        self._file.write(self._head)
        return self

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor.

        Raises:
            ValueError: Another type or row shape than laid out, or more rows than laid out.
        """
        dtype, shape = self._layout[name]
        if rows.dtype != dtype or rows.shape[1:] != shape[1:]:
            raise ValueError(
                f"{name} must be rows of {dtype} {list(shape[1:])}, "
                f"got {rows.dtype} {list(rows.shape[1:])}"
            )
        if self._next[name] + rows.nbytes > self._end[name]:
            raise ValueError(f"{name} must have {shape[0]} rows, got more")
        self._file.seek(self._next[name])
        self._file.write(np.ascontiguousarray(rows).reshape(-1).data.cast("B"))
        self._next[name] += rows.nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Move the file into place, or remove it after an error."""
        try:
            with self._file as file:
                if kind is not None:
                    return
                short = [name for name in self._layout if self._next[name] != self._end[name]]
                if short:
                    raise ValueError(f"{self._path}: not all rows of {', '.join(short)} written")
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: str) -> None:
    """Write the file under a temporary name beside ``path``, then move it into place."""
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with Writer(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


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
        prefix = file.read(9)
        if prefix[8:] != b"{":
            raise ValueError(
                f"{path}: is not a routing trace: import it first (ndp-gym trace import)"
            )
        file.seek(8)
        (length,) = struct.unpack("<Q", prefix[:8])
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
