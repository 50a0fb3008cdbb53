"""Quantizers of weight matrices, and the relative error that they make.

Data-free and group-wise (``quantization.md`` section 5, "mse" grid): every row of a matrix is cut
into groups along its input dimension, and each group has its own scale and zero point. From 2 bits
on, the range of a group is shrunk by the factor in 0.3..1 (61 steps) that makes its squared error
least; at 1 bit a group is stored as signs and one mean magnitude, since two levels at the extremes
of the range would be useless.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["GROUP", "group_sizes", "quantize", "relative_error", "stored_bits_per_weight"]

GROUP = 128
"""Weights that share a scale, by default (format ``mse_g128``)."""

CLIPS = np.linspace(1.0, 0.3, 61, dtype=np.float32)
"""Shares of a group's range that the search tries; of equal ones the widest wins."""

MAX_BITS = 8
_PARAMETER_BITS = 16  # of a scale or a zero point
_BLOCK = 1 << 15  # weights searched at once: what fits the cache of a core

Array = npt.NDArray[np.float32]


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
    matrix, exponent = _normalised(weight)
    dequantized = np.empty_like(matrix)
    for rows, columns, size in _blocks(matrix.shape, group):
        block = matrix[rows, columns]
        dequantized[rows, columns] = _stored(block.reshape(-1, size), bits).reshape(block.shape)
    return np.asarray(np.ldexp(dequantized, exponent), dtype=np.float32)


def relative_error(weight: npt.ArrayLike, bits: int, group: int = GROUP) -> float:
    """``||W^ - W||^2 / ||W||^2`` for W^ of :func:`quantize`; 0 for a matrix of zeros.

    Raises:
        ValueError: as :func:`quantize`.
    """
    matrix, _ = _normalised(weight)
    lost = total = 0.0
    for rows, columns, size in _blocks(matrix.shape, group):
        groups = matrix[rows, columns].reshape(-1, size)
        difference = _stored(groups, bits) - groups
        lost += float(np.sum(np.square(difference), dtype=np.float64))
        total += float(np.sum(np.square(groups), dtype=np.float64))
    return lost / total if total > 0 else 0.0


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


def _normalised(weight: npt.ArrayLike) -> tuple[Array, int]:
    """The checked matrix times the power of two that brings its largest entry to 0.5..1."""
    matrix = np.asarray(weight, dtype=np.float32)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"weight must be a matrix [out, in], got shape {matrix.shape}")
    largest = max(float(matrix.max()), -float(matrix.min()))
    if not np.isfinite(largest):
        raise ValueError("weight must be finite, got nan or infinity")
    exponent = int(np.frexp(largest)[1])
    return np.ldexp(matrix, -exponent), exponent


def _blocks(shape: tuple[int, ...], group: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows and columns that hold whole groups of one size, few enough to stay in the cache."""
    n_rows, n_columns = shape
    sizes = group_sizes(n_columns, group)
    start = 0
    for size in sorted(set(sizes), reverse=True):
        stop = start + size * sizes.count(size)
        step = max(1, _BLOCK // (stop - start))
        for row in range(0, n_rows, step):
            yield slice(row, row + step), slice(start, stop), size
        start = stop


def _stored(groups: Array, bits: int) -> Array:
    """Groups [n, size] as they are after storing them."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in 1..{MAX_BITS}, got {bits}")
    return _signs(groups) if bits == 1 else _clip_searched(groups, bits)


def _signs(groups: Array) -> Array:
    magnitude = np.abs(groups).mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.asarray(np.where(groups >= 0, magnitude, -magnitude), dtype=np.float32)


def _clip_searched(groups: Array, bits: int) -> Array:
    """Levels ``low * clip + step * clip * q`` with q in 0..2^bits-1, clip the best of the grid."""
    top = np.float32(2**bits - 1)
    low = groups.min(axis=1, keepdims=True)
    step = (groups.max(axis=1, keepdims=True) - low) / top
    step = np.where(step > 0, step, np.float32(1))  # a constant group is exact at clip 1
    position, offset = (groups - low) / step, low / step
    best_clip = np.ones_like(low)
    least = np.full_like(low, np.inf)
    level = np.empty_like(groups)
    exact = np.empty_like(groups)
    for clip in CLIPS:
        stretch = np.float32(1) / clip
        np.multiply(position, stretch, out=exact)
        exact += offset * (stretch - np.float32(1))
        np.rint(exact, out=level)
        np.clip(level, 0, top, out=level)
        level -= exact
        error = np.einsum("ij,ij->i", level, level)[:, None] * (clip * clip)
        better = error < least
        np.copyto(best_clip, clip, where=better)
        np.copyto(least, error, where=better)
    stretch = np.float32(1) / best_clip
    exact = position * stretch + offset * (stretch - np.float32(1))
    level = np.clip(np.rint(exact), 0, top)
    return np.asarray((low + step * level) * best_clip, dtype=np.float32)
