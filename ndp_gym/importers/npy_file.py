"""A ``.npy`` file in memory, its header read with care and nothing unpickled."""

import io
import math
import warnings
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAGIC = b"\x93NUMPY"


class Layout(NamedTuple):
    """What a header says: type, shape, whether the first axis runs fastest; and the bytes after."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    data: bytes

    def array(self) -> npt.NDArray[Any]:
        """The array, whose bytes ``check_size`` has counted."""
        flat = np.frombuffer(self.data, dtype=self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def layout(data: bytes, name: str) -> Layout:
    """The layout of a file's bytes.

    Raises:
        ValueError: No such file, objects in it, or a size other than that of the data.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old headers, which are read all the same
            shape, fortran, dtype = reader(file)
    except KeyError:
        raise ValueError(f"{name}: .npy version must be 1.0 or 2.0, got {version}") from None
    except (ValueError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name}: damaged .npy header: {str(error)[:120]}") from None
    found = Layout(dtype, tuple(shape), bool(fortran), data[file.tell() :])
    check_size(found, name)
    return found


def check_size(found: Layout, name: str) -> None:
    """Raise ``ValueError`` unless the layout holds numbers, as many as there are bytes for."""
    dtype, shape = found.dtype, found.shape
    if dtype.hasobject or dtype.itemsize < 1 or any(size < 0 for size in shape):
        raise ValueError(f"{name} must hold numbers, got {dtype} {list(shape)!s:.60}")
    if (size := math.prod(shape) * dtype.itemsize) != len(found.data):
        raise ValueError(
            f"{name} must hold {size} bytes for {list(shape)!s:.60} {dtype}, got {len(found.data)}"
        )
