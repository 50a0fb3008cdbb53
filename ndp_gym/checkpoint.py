"""Tensors of a checkpoint in safetensors, read one slice at a time whatever its size.

A checkpoint is one file, a folder of files, or a folder whose ``model.safetensors.index.json`` says
which file holds which tensor.
"""

import math
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.trace_file import parse_json

__all__ = ["Checkpoint", "Tensor"]

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_HEADER_BYTES = 100 * 10**6
"""The limit of the safetensors library."""

_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


class Tensor(NamedTuple):
    """Where a tensor lies: file, first byte, type as safetensors names it, and shape."""

    name: str
    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, *index: int) -> npt.NDArray[np.float32]:
        """The tensor, or the part at ``index`` of its first axes, in single precision.

        Raises:
            ValueError: its type is none of BF16, F16 and F32.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.path}: {self.name} must be one of {', '.join(_DTYPES)}, got {self.dtype}: "
                f"measure weights that are not quantized yet"
            )
        dtype, rest = np.dtype(_DTYPES[self.dtype]), self.shape[len(index) :]
        count, position = math.prod(rest), 0
        for i, length in zip(index, self.shape, strict=False):
            position = position * length + i
        start = self.offset + position * count * dtype.itemsize
        raw = np.fromfile(self.path, dtype, count, offset=start)
        if self.dtype == "BF16":  # the upper half of single precision
            wide = raw.astype("<u4")
            wide <<= 16
            raw = wide.view("<f4")
        return raw.astype(np.float32, copy=False).reshape(rest)


class Checkpoint(NamedTuple):
    """Every tensor by name, the files that hold them, and ``config.json`` where there is one."""

    tensors: Mapping[str, Tensor]
    sources: tuple[dict[str, Any], ...]
    config: Mapping[str, Any]
    paths: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the headers of all files.

        Args:
            path: a safetensors file, an index file, or a folder with either.

        Raises:
            ValueError: a file is damaged or missing; names it.
            OSError: a file cannot be read.
        """
        folder = path if path.is_dir() else path.parent
        index = path if path.suffix == ".json" else folder / INDEX
        mapped: dict[str, str] | None = None
        if path.suffix != ".json" and not path.is_dir():
            paths = [path]
        elif index.is_file() or path.suffix == ".json":
            mapped = _weight_map(index)
            paths = [folder / name for name in sorted(set(mapped.values()))]
            if missing := [shard.name for shard in paths if not shard.is_file()]:
                raise ValueError(
                    f"{folder}: {len(missing)} of {len(paths)} files of {index.name} are missing: "
                    f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                )
        else:
            paths = sorted(folder.glob("*.safetensors"))
            if not paths:
                raise ValueError(f"{folder}: holds no safetensors file")
        tensors: dict[str, Tensor] = {}
        sources = []
        for shard in paths:
            found, digest = _read_header(shard)
            for name in found.keys() & tensors.keys():
                raise ValueError(f"{shard}: {name} is also in {tensors[name].path.name}")
            tensors |= found
            sources.append(
                {"file": shard.name, "bytes": shard.stat().st_size, "header_sha256": digest}
            )
        for name, file in (mapped or {}).items():
            if name not in tensors or tensors[name].path.name != file:
                raise ValueError(f"{folder}: {index.name} names {name} in {file}, which lacks it")
        config = folder / CONFIG
        facts = parse_json(config.read_bytes(), str(config)) if config.is_file() else {}
        if not isinstance(facts, dict):
            raise ValueError(f"{config}: must be a JSON object")
        return cls(tensors, tuple(sources), facts, tuple(paths))


def _weight_map(index: Path) -> dict[str, str]:
    content = parse_json(index.read_bytes(), str(index))
    mapped = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise ValueError(f"{index}: must hold a weight_map of tensor names to files")
    for name, file in mapped.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: the file of {name} must be a plain name, got {file!r:.80}")
    return mapped


def _read_header(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of one file, and the hex sha256 of its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: not a safetensors file, or a truncated one")
        text = file.read(length)
    header = parse_json(text, f"{path}: header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header must be a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: {name}: dtype, shape or data_offsets are damaged") from None
        if not 0 <= begin <= end or 8 + length + end > size:
            raise ValueError(
                f"{path}: truncated: {name} ends at byte {8 + length + end}, the file has {size}"
            )
        if dtype in _DTYPES and end - begin != math.prod(shape) * int(_DTYPES[dtype][-1]):
            raise ValueError(f"{path}: {name}: {end - begin} bytes cannot be {dtype} {list(shape)}")
        tensors[name] = Tensor(name, path, 8 + length + begin, dtype, shape)
    return tensors, sha256(text).hexdigest()
