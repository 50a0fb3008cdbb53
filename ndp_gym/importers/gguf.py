"""The tensors of small GGUF files, such as importance matrices; every length is checked.

Layout of versions 2 and 3, little-endian: magic, version u32, tensors u64, facts u64; per fact a
text, a type u32 and a value; per tensor a text, axes u32, sizes u64, type u32 and offset u64; then,
from the next multiple of ``general.alignment`` (32), the data.
"""

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.source import Source

MAGIC = b"GGUF"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY, _F32 = 8, 9, 0
_MAX_DEPTH = 4
_MAX_AXES = 4


class _Tensor(NamedTuple):
    shape: tuple[int, ...]  # fastest axis first
    kind: int
    offset: int


class _Cursor:
    """A place in the file that cannot leave it."""

    def __init__(self, source: Source) -> None:
        self.source, self.at = source, len(MAGIC)

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        if n_bytes > len(self.source.data) - self.at:
            raise self.source.fail(
                f"truncated or damaged GGUF: {n_bytes} bytes announced at byte {self.at} of "
                f"{len(self.source.data)}"
            )
        self.at += n_bytes
        return self.source.data[self.at - n_bytes : self.at]

    def number(self, code: str) -> int:
        """The next number, of a struct code."""
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> int | None:
        """Pass over the next value; gives whole numbers, the rest is not needed."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            self.take(self.number("Q"))
            return None
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise self.source.fail(f"damaged GGUF: unknown type {kind} at byte {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        for _ in range(count):  # each takes 8 bytes at least, so that the file ends it
            self.value(inner, depth + 1)
        return None


def float_tensors(
    source: Source, wanted: Callable[[str], bool]
) -> dict[str, npt.NDArray[np.float32]]:
    """The float32 tensors whose name is ``wanted``, flat.

    Raises:
        ValueError: Not GGUF 2 or 3, damaged, a tensor outside the file, or of another type.
    """
    cursor = _Cursor(source)
    version, n_tensors, n_facts = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise source.fail(f"GGUF version must be 2 or 3, got {version}")
    alignment = 32
    for _ in range(n_facts):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if key == "general.alignment":
            alignment = int(value or 0)
    if not 1 <= alignment <= 2**16:
        raise source.fail(f"general.alignment must be in 1..65536, got {alignment}")
    found: dict[str, _Tensor] = {}
    for _ in range(n_tensors):
        name, n_axes = cursor.text(), cursor.number("I")
        if n_axes > _MAX_AXES or name in found:
            raise source.fail(f"damaged GGUF: tensor {name!r:.60} twice or with {n_axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(n_axes))
        found[name] = _Tensor(shape, cursor.number("I"), cursor.number("Q"))
    start = -(-cursor.at // alignment) * alignment
    return {name: _floats(source, name, t, start) for name, t in found.items() if wanted(name)}


def _floats(source: Source, name: str, tensor: _Tensor, start: int) -> npt.NDArray[np.float32]:
    size = 4 * math.prod(tensor.shape)
    first = start + tensor.offset
    if tensor.kind != _F32 or size > len(source.data) - first:
        raise source.fail(
            f"{name!r:.60} must be float32 inside the file, got type {tensor.kind} and {size} "
            f"bytes at byte {first} of {len(source.data)}"
        )
    return np.frombuffer(source.data, dtype="<f4", count=size // 4, offset=first)
