"""Quantizers of weight matrices, and the relative error that they make.

Data-free and group-wise (``docs/model.md`` section 6): every row of a matrix is cut
into groups along its input dimension, and each group has its own scale and zero point. From 2 bits
on, the range of a group is shrunk by the factor in 0.3..1 (61 steps) that makes its squared error
least; at 1 bit a group is stored as signs and one mean magnitude, since two levels at the extremes
of the range would be useless.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from ndp_gym.quantizer_loops import search

__all__ = ["GROUP", "group_sizes", "quantize", "relative_error", "stored_bits_per_weight"]

GROUP = 128
"""Weights that share a scale, by default (format ``mse_g128``)."""

CLIPS = np.linspace(1.0, 0.3, 61, dtype=np.float32)
"""Shares of a group's range that the search tries; of equal ones the widest wins."""

MAX_BITS = 8
_PARAMETER_BITS = 16  # of a scale or a zero point
_BLOCK = 1 << 18  # weights searched at once

Array = npt.NDArray[np.float32]
Block = tuple[slice, slice, int]
"""Rows, columns and group size of a part of a matrix."""


def quantize(weight: npt.ArrayLike, bits: int, group: int = GROUP) -> Array:
    """The matrix as it is after storing it at ``bits`` bits.

    Args:
        weight: [out, in], finite.
        bits: 1 (signs) to 8.
        group: largest number of weights of a row that share a scale; see :func:`group_sizes`.

    Returns:
        [out, in] float32.

    Raises:
        ValueError: if the matrix is not 2-d, finite and non-empty, or ``bits`` or ``group`` is out
            of range.
    """
    matrix, exponent = _checked(weight, bits)
    dequantized = np.empty_like(matrix)
    for rows, columns, size in _blocks(matrix.shape, group):
        block = np.ldexp(matrix[rows, columns], -exponent)
        groups = np.ascontiguousarray(block).reshape(-1, size)
        stored = _signs(groups) if bits == 1 else _clip_searched(groups, bits)
        dequantized[rows, columns] = np.ldexp(stored, exponent).reshape(block.shape)
    return dequantized


def relative_error(
    weight: npt.ArrayLike, bits: int, group: int = GROUP, pool: ThreadPoolExecutor | None = None
) -> float:
    """``||W^ - W||^2 / ||W||^2`` for W^ of :func:`quantize`; 0 for a matrix of zeros.

    ``pool`` shares the work between threads, with the same result.

    Raises:
        ValueError: as :func:`quantize`.
    """
    matrix, exponent = _checked(weight, bits)
    blocks = _blocks(matrix.shape, group)
    errors = (pool.map if pool else map)(partial(_block_error, matrix, exponent, bits), blocks)
    lost, total = np.array(list(errors)).sum(axis=0)
    return float(lost / total) if total > 0 else 0.0


def group_sizes(n_inputs: int, group: int = GROUP) -> list[int]:
    """Weights per group of a row of ``n_inputs``: as few groups as possible, of equal size.

    Where ``group`` does not divide the row, sizes differ by at most one, the larger ones first: a
    row of 2880 has 23 groups of 126 or 125, a row of 40 is one group.

    Raises:
        ValueError: if either number is not positive.
    """
    if group < 1 or n_inputs < 1:
        raise ValueError(f"group and inputs must be >= 1, got {group} and {n_inputs}")
    n_groups = -(-n_inputs // group)
    size, n_larger = divmod(n_inputs, n_groups)
    return [size + 1] * n_larger + [size] * (n_groups - n_larger)


def stored_bits_per_weight(n_inputs: int, bits: int, group: int = GROUP) -> float:
    """Bits per weight with the groups' scales, and zero points from 2 bits on, 16 bits each."""
    parameters = 1 if bits == 1 else 2
    return bits + _PARAMETER_BITS * parameters * len(group_sizes(n_inputs, group)) / n_inputs


def _checked(weight: npt.ArrayLike, bits: int) -> tuple[Array, int]:
    """The matrix in single precision, and the power of two just above its largest entry."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in 1..{MAX_BITS}, got {bits}")
    matrix = np.asarray(weight, dtype=np.float32)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"weight must be a matrix [out, in], got shape {matrix.shape}")
    largest = max(float(matrix.max()), -float(matrix.min()))
    if not np.isfinite(largest):
        raise ValueError("weight must be finite, got nan or infinity")
    return matrix, int(np.frexp(largest)[1])


def _blocks(shape: tuple[int, ...], group: int) -> Iterator[Block]:
    """Parts of a matrix that hold whole groups of one size."""
    n_rows, n_columns = shape
    sizes = group_sizes(n_columns, group)
    start = 0
    for size in sorted(set(sizes), reverse=True):
        stop = start + size * sizes.count(size)
        step = max(1, _BLOCK // (stop - start))
        for row in range(0, n_rows, step):
            yield slice(row, row + step), slice(start, stop), size
        start = stop


def _block_error(matrix: Array, exponent: int, bits: int, block: Block) -> tuple[float, float]:
    """Squared error and squared norm of one part, of weights scaled into -1..1."""
    rows, columns, size = block
    scaled = np.ldexp(matrix[rows, columns], -exponent)
    groups = np.ascontiguousarray(scaled).reshape(-1, size)
    if bits == 1:
        lost = np.sum(np.square(_signs(groups) - groups), dtype=np.float64)
    else:
        lost = np.sum(_searched(groups, bits)[3], dtype=np.float64)
    return float(lost), float(np.sum(np.square(groups), dtype=np.float64))


def _signs(groups: Array) -> Array:
    magnitude = np.abs(groups).mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.asarray(np.where(groups >= 0, magnitude, -magnitude), dtype=np.float32)


def _searched(groups: Array, bits: int) -> tuple[Array, Array, Array, Array]:
    """Low end, step, best clip and squared error of every group, [n] each."""
    found = tuple(np.empty(len(groups), np.float32) for _ in range(4))
    search(groups, CLIPS, np.float32(2**bits - 1), *found)
    low, step, clip, error = found
    return low, step, clip, error


def _clip_searched(groups: Array, bits: int) -> Array:
    """Levels ``(low + step * q) * clip`` with q in 0..2^bits-1, clip the best of the grid."""
    low, step, clip, _ = (column[:, None] for column in _searched(groups, bits))
    stretch = np.float32(1) / clip
    exact = (groups - low) / step * stretch + low / step * (stretch - np.float32(1))
    level = np.clip(np.rint(exact), 0, np.float32(2**bits - 1))
    return np.asarray((low + step * level) * clip, dtype=np.float32)
