"""A ``.pt`` file read without running anything in it."""

import io
import warnings
import zipfile
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.source import Source, integers

MAGIC = b"PK\x03\x04"


def load(source: Source) -> Any:
    """What ``torch.load(weights_only=True)`` gives: tensors, numbers, texts, lists and dicts.

    Raises:
        ValueError: Not such a file, compressed content (a bomb), or objects that would need code.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source.data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise source.fail(f"damaged .pt file: {str(error)[:120]}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise source.fail("must hold uncompressed entries, as torch.save writes them")
    if sum(entry.file_size for entry in entries) > len(source.data):
        raise source.fail(f"entries must fit into its {len(source.data)} bytes: damaged or forged")
    torch = import_module("torch")  # by name: a simulator without it reads every other format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, in damaged files
            return torch.load(io.BytesIO(source.data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise a dozen types, all of them mean the same
        reason = " ".join(str(error).split())[:120]
        raise source.fail(
            f"must be readable without running code in it (torch.load, weights_only): {reason}"
        ) from None


def array(value: object, n_dims: int, limit: int, name: str) -> npt.NDArray[np.int64]:
    """A tensor or nested list of whole numbers as int64 with ``n_dims`` axes.

    Args:
        value: What was loaded.
        n_dims: Axes.
        limit: Elements allowed; an expanded tensor, or a list named twice, can claim any size.
        name: For messages.
    """
    if hasattr(value, "numel") and hasattr(value, "numpy"):
        if value.numel() > limit:
            raise ValueError(f"{name} must have at most {limit} numbers, got {value.numel()}")
        try:
            value = value.detach().numpy()  # type: ignore[attr-defined]
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} must be a plain tensor: {str(error)[:80]}") from None
        result = np.asarray(value)
    elif isinstance(value, list):
        result = integers(value, n_dims, name, limit)
    else:
        raise ValueError(f"{name} must be a tensor or a list, got {type(value).__name__}")
    if result.dtype.kind not in "iu" or result.ndim != n_dims or 0 in result.shape:
        raise ValueError(
            f"{name} must be whole numbers with {n_dims} non-empty axes, "
            f"got {result.dtype} {list(result.shape)}"
        )
    if int(result.max()) >= 2**31 or int(result.min()) < -1:
        raise ValueError(f"{name} must be in -1..2**31-1, got {result.min()}..{result.max()}")
    return result.astype(np.int64)
