"""A foreign file in memory: read with size caps, unpacked, hashed; parsed on demand."""

import gzip
import hashlib
import io
import reprlib
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.trace_file import parse_json
from ndp_gym.units import GIB, MIB

MAX_BYTES = 2 * GIB
MAX_RATIO = 200  # routing text packs 5..50 times
FREE_BYTES = 64 * MIB  # unpacked size below which the ratio does not matter
AS_PROFILE = "use it as a popularity profile (ndp-gym evaluate --profile)"
_CHUNK = MIB // 4


@dataclass(frozen=True, eq=False)
class Source:
    """One file: its path and its unpacked content."""

    path: Path
    data: bytes

    @property
    def stem(self) -> str:
        """File name without ``.gz`` and without its last suffix."""
        name = self.path.name.removesuffix(".gz")
        return name.rsplit(".", 1)[0]

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the unpacked content."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def json(self) -> Any:
        """The whole content as JSON."""
        return parse_json(self.data, str(self.path))

    @cached_property
    def lines(self) -> list[bytes]:
        """Non-empty lines."""
        return [line for line in self.data.splitlines() if line.strip()]

    def fail(self, problem: str) -> ValueError:
        """A ``ValueError`` that names this file."""
        return ValueError(f"{self.path}: {problem}")


def open_source(path: Path) -> Source:
    """Read a file, unpacking gzip whatever its name.

    Raises:
        ValueError: Empty, not gzip though named so, truncated, or larger than allowed: more than
            2 GiB, or more than 64 MiB unpacked from less than a 200th of it.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: must be at most {MAX_BYTES} bytes, got {size}")
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = _unpack(path, data)
    elif path.name.endswith(".gz"):
        raise ValueError(f"{path}: named .gz but not gzip data, starts with {data[:4]!r}")
    if not data.strip():
        raise ValueError(f"{path}: is empty")
    return Source(path, data)


def _unpack(path: Path, packed: bytes) -> bytes:
    limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * len(packed)))
    chunks: list[bytes] = []
    total = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            while chunk := file.read(_CHUNK):
                chunks.append(chunk)
                total += len(chunk)
                if total > limit:
                    raise ValueError(
                        f"{path}: unpacks to more than {limit} bytes from {len(packed)}: refused"
                    )
    except EOFError:
        raise ValueError(f"{path}: truncated gzip data") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip data: {error}") from None
    return b"".join(chunks)


def integers(
    value: object, n_dims: int, name: str, most: int | None = None
) -> npt.NDArray[np.int64]:
    """Nested lists as an int64 array of ``n_dims`` axes, none of them empty.

    Args:
        value: What was parsed.
        n_dims: Axes.
        name: For messages.
        most: Numbers allowed, where the lists may name one list many times.

    Raises:
        ValueError: Ragged, another depth, or anything but whole numbers below 2**31.
    """
    array = numbers(value, n_dims, name, {int}, most)
    if array.dtype.kind not in "iu" or int(array.max()) >= 2**31 or int(array.min()) < -(2**31):
        raise ValueError(f"{name} must be below 2**31, got {array.max()}")
    return array.astype(np.int64)


def numbers(
    value: object, n_dims: int, name: str, types: set[type], most: int | None = None
) -> npt.NDArray[Any]:
    """Nested lists of ``types`` (int, float) as an array; see ``integers``.

    Types and lengths are looked at before NumPy sees them: one long text among numbers would
    otherwise make an array of texts of its length.
    """
    kind = "whole numbers" if types == {int} else "numbers"
    rule = f"{name} must be a regular array of {kind} with {n_dims} non-empty axes"
    level: list[Any] = [value]
    for axis in range(n_dims):
        if not all(type(item) is list for item in level):
            raise ValueError(f"{rule}, got {shown(value)}")
        if axis < n_dims - 1:
            level = list(chain.from_iterable(level))
        if most is not None and sum(map(len, level) if axis == n_dims - 1 else [len(level)]) > most:
            raise ValueError(f"{name} must have at most {most} numbers")
    if not set(chain.from_iterable(map(type, item) for item in level)) <= types:
        raise ValueError(f"{rule}, got {shown(value)}")
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{rule}, got a ragged one") from None
    if array.ndim != n_dims or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise ValueError(f"{rule}, got {array.dtype} {list(array.shape)}")
    return array


def shown(value: object) -> str:
    """A short text for messages, however long or deep the value is."""
    return reprlib.repr(value)[:80]


def whole_number(value: object, low: int, high: int, name: str) -> int:
    """The value itself if it is an integer in ``low..high``."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in {low}..{high}, got {shown(value)}")
    return value
