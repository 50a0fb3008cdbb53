"""Arrays kept on disk by what they were computed from, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.report import write_whole

Array = NDArray[Any]


class Cache:
    """A folder of arrays; ``None`` keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Keep arrays in ``folder``."""
        self._folder = folder

    def get(self, key: tuple[object, ...], make: Callable[[], Array]) -> Array:
        """What ``make`` returns, from disk if it was made before for an equal ``key``.

        Keys are made of texts, numbers and arrays.
        """
        return self.get_all(key, lambda: {"value": make()})["value"]

    def get_all(
        self, key: tuple[object, ...], make: Callable[[], dict[str, Array]]
    ) -> dict[str, Array]:
        """The same for several arrays by name."""
        if self._folder is None:
            return make()
        path = self._folder / f"{_name(key)}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        arrays, buffer = make(), io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_whole(path, buffer.getvalue())
        return arrays


def _name(key: tuple[object, ...]) -> str:
    digest = hashlib.sha256()
    for part in key:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b";")
    return f"{key[0]}-{digest.hexdigest()[:24]}"
