"""RoutingTrace: which experts every recorded token was routed to, in one memory-mapped file.

Rows (tokens) come first, so that a decode window is one contiguous slice. It knows nothing of
hardware, placement or time.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym import trace_file
from ndp_gym.trace_content import id_dtype, scan
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import COLUMNS, SPLITS, IntArray, Requests
from ndp_gym.trace_spans import find_shared_span

__all__ = ["Requests", "RoutingTrace", "TraceMetadata"]

IdArray = npt.NDArray[Any]  # uint8 or uint16
GateArray = npt.NDArray[np.float16]
_SCAN_VALUES = 2**22  # ids checked at a time


class RoutingTrace:
    """A recording of expert choices; immutable.

    Content is checked once per request, the first time one of its rows is asked for through
    ``window`` or ``check_rows``, and remembered; ``verify`` checks everything at once.

    Attributes:
        expert_ids: ``[T, L, K]`` uint8 (E <= 256) or uint16, read-only. Cast before arithmetic.
        gate_weights: ``[T, L, K]`` float16 as the model applied them, or None.
        requests: The request table.
        metadata: What the recording says about itself.
        path: The file it was opened from, or None.
    """

    def __init__(
        self,
        expert_ids: IdArray,
        gate_weights: GateArray | None,
        requests: Requests,
        metadata: TraceMetadata,
        *,
        path: Path | None = None,
    ) -> None:
        """Check shapes, types and the request table, not the content (see ``from_arrays``)."""
        self.expert_ids = expert_ids
        self.gate_weights = gate_weights
        self.requests = requests
        self.metadata = metadata
        self.path = path
        self._checked = np.zeros(len(requests), dtype=np.bool_)
        self._sha256: str | None = None
        self._check_structure()
        requests.check(self.n_rows, self.name)
        self._end = requests.end

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """The trace in a file, memory-mapped; header and request table are checked at once.

        Raises:
            ValueError: The file is not a valid trace; names file, field and value.
            OSError: It cannot be read.
        """
        path = Path(path)
        tensors, text = trace_file.read(path)
        metadata, domains = TraceMetadata.from_json(text, str(path))
        unknown = set(tensors) - {"expert_ids", "gate_weights", "requests"}
        missing = {"expert_ids", "requests"} - set(tensors)
        if unknown or missing:
            raise ValueError(
                f"{path}: tensors must be expert_ids, requests and optionally gate_weights, "
                f"got {sorted(tensors)}"
            )
        table = tensors["requests"]
        if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != len(COLUMNS):
            raise ValueError(
                f"{path}: requests must be int64 [R, {len(COLUMNS)}], "
                f"got {table.dtype} {list(table.shape)}"
            )
        requests = Requests.from_table(table, domains)
        return cls(
            tensors["expert_ids"], tensors.get("gate_weights"), requests, metadata, path=path
        )

    @classmethod
    def from_arrays(
        cls,
        expert_ids: npt.ArrayLike,
        requests: Requests,
        metadata: TraceMetadata,
        *,
        gate_weights: npt.ArrayLike | None = None,
    ) -> "RoutingTrace":
        """A trace in memory, its content checked; ids of any integer type are copied to uint8/16.

        Raises:
            ValueError: Shape, table or content is wrong; names field and value.
        """
        ids = np.asarray(expert_ids)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"expert_ids must be integers, got {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= metadata.n_experts):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"expert_ids must be in 0..n_experts-1={metadata.n_experts - 1}, got {bad}"
            )
        ids = np.array(ids, dtype=id_dtype(metadata.n_experts), order="C")
        ids.flags.writeable = False
        gates = None
        if gate_weights is not None:
            with np.errstate(over="ignore"):
                gates = np.array(gate_weights, dtype=np.float16, order="C")
            gates.flags.writeable = False
        trace = cls(ids, gates, requests, metadata)
        trace._check_content()
        return trace

    @property
    def name(self) -> str:
        """File name, or the model's name for a trace in memory; starts every error message."""
        return str(self.path) if self.path is not None else f"trace of {self.metadata.model}"

    @property
    def n_rows(self) -> int:
        """Recorded tokens T."""
        return int(self.expert_ids.shape[0])

    @property
    def n_layers(self) -> int:
        """Routed layers L."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token K."""
        return int(self.expert_ids.shape[2])

    @property
    def n_experts(self) -> int:
        """Experts per layer E."""
        return self.metadata.n_experts

    @property
    def sha256(self) -> str:
        """Hex sha256 of the file, or of the file that ``save`` would write; computed once."""
        if self._sha256 is None:
            if self.path is not None:
                self._sha256 = trace_file.file_sha256(self.path)
            else:
                self._sha256 = trace_file.content_sha256(self._tensors(), self._metadata_json())
        return self._sha256

    def window(self, first: int, n: int) -> tuple[IdArray, GateArray | None]:
        """Rows ``first .. first + n`` as views: ids ``[n, L, K]`` and gates (or None), checked."""
        if n < 1 or first < 0 or first + n > self.n_rows:
            raise ValueError(
                f"{self.name}: window must lie in rows 0..{self.n_rows}, got first={first}, n={n}"
            )
        self.check_rows(np.array([first]), np.array([n]))
        gates = None if self.gate_weights is None else self.gate_weights[first : first + n]
        return self.expert_ids[first : first + n], gates

    def check_rows(self, first_row: IntArray, n_rows: IntArray) -> None:
        """Check the content of the slices ``first_row[b] .. + n_rows[b]``; cheap when repeated.

        The whole request that holds a slice is checked the first time and remembered, so that a
        further call costs two look-ups per slice. Slices outside any request, or across several,
        are scanned every time.

        Raises:
            ValueError: An id >= n_experts, a repeated id in one top-k row, or a gate that is not
                finite and >= 0; names file, field, row, layer and value.
        """
        requests = self.requests
        holder = requests.start.searchsorted(first_row, side="right") - 1
        held = (holder >= 0) & (first_row + n_rows <= self._end[holder])
        if held.all() and self._checked[holder].all():
            return
        for first, n, index, inside in zip(first_row, n_rows, holder, held, strict=True):
            if n == 0 or (inside and self._checked[index]):
                continue
            if inside:
                self._scan(int(requests.start[index]), int(self._end[index]))
                self._checked[index] = True
            else:
                self._scan(int(first), int(first + n))

    def split_requests(self, split: str) -> IntArray:
        """Indices of the requests of a split that have decode rows, in file order.

        Raises:
            ValueError: Unknown split, a recording with fewer than 16 conversations asked for train
                or val, or no such request.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if split != "test" and self.requests.evaluation_only:
            raise ValueError(
                f"{self.name}: split must be 'test', got {split!r}: with "
                f"{self.requests.n_conversations} conversations (fewer than 16) the recording is "
                f"for evaluation only"
            )
        chosen = np.flatnonzero(
            (self.requests.split == SPLITS.index(split)) & (self.requests.n_decode > 0)
        )
        if not len(chosen):
            raise ValueError(f"{self.name}: split {split!r} holds no request with decode rows")
        return chosen

    def assign_splits(self, seed: int) -> "RoutingTrace":
        """The same rows with splits dealt out anew (see ``trace_requests.assign_splits``)."""
        requests = self.requests.with_splits(seed)
        return RoutingTrace(self.expert_ids, self.gate_weights, requests, self.metadata)

    def tile_layers(self, n_layers: int) -> "RoutingTrace":
        """A copy with ``n_layers`` layers, layer i routed as recorded layer ``i % L``; labelled.

        The metadata gets ``tiled_from`` and the model's name says it.
        """
        if n_layers < self.n_layers:
            raise ValueError(
                f"n_layers must be at least the recorded {self.n_layers}, got {n_layers}"
            )
        index = np.arange(n_layers) % self.n_layers
        sizes = self.metadata.expert_bytes
        metadata = replace(
            self.metadata,
            model=f"{self.metadata.model} (tiled from {self.n_layers} to {n_layers} layers)",
            preset=None,
            tiled_from=self.n_layers,
            layer_ids=None,
            expert_bytes=None if sizes is None else tuple(sizes[i] for i in index),
        )
        gates = None if self.gate_weights is None else self.gate_weights[:, index]
        return RoutingTrace.from_arrays(
            self.expert_ids[:, index], self.requests, metadata, gate_weights=gates
        )

    def save(self, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Verify, write atomically and return the trace opened from ``path``."""
        self.verify()
        trace_file.write(Path(path), self._tensors(), self._metadata_json())
        return RoutingTrace.open(path)

    def verify(self) -> None:
        """Scan the whole content, and look for text that two splits share.

        Raises:
            ValueError: See ``check_rows``; or a routing span of at least 64 tokens stands in two
                splits (leakage).
        """
        self._check_content()
        shared = find_shared_span(self.expert_ids, self.requests)
        if shared is not None:
            first, second, n_rows = shared
            raise ValueError(
                f"{self.name}: requests.split must keep text together, got {n_rows} tokens routed "
                f"alike at rows {first} and {second}, which are in different splits"
            )

    def _tensors(self) -> dict[str, npt.NDArray[Any]]:
        tensors: dict[str, npt.NDArray[Any]] = {"requests": self.requests.table()}
        if self.gate_weights is not None:
            tensors["gate_weights"] = self.gate_weights
        tensors["expert_ids"] = self.expert_ids
        return tensors

    def _metadata_json(self) -> str:
        return self.metadata.to_json(self.requests.domains)

    def __reduce__(self) -> tuple[Callable[..., "RoutingTrace"], tuple[Any, ...]]:
        """Pickle a trace with a file as its path, so that worker processes share the memory map."""
        if self.path is not None:
            return RoutingTrace.open, (self.path,)
        make = partial(RoutingTrace.from_arrays, gate_weights=self.gate_weights)
        return make, (self.expert_ids, self.requests, self.metadata)

    def _check_structure(self) -> None:
        ids, metadata = self.expert_ids, self.metadata
        dtype = id_dtype(metadata.n_experts)
        if ids.ndim != 3 or 0 in ids.shape or ids.shape[2] != metadata.top_k or ids.dtype != dtype:
            raise ValueError(
                f"{self.name}: expert_ids must be {dtype} [T, L, top_k={metadata.top_k}] for "
                f"n_experts={metadata.n_experts}, got {ids.dtype} {list(ids.shape)}"
            )
        gates = self.gate_weights
        if gates is not None and (gates.shape != ids.shape or gates.dtype != np.float16):
            raise ValueError(
                f"{self.name}: gate_weights must be float16 {list(ids.shape)} like expert_ids, "
                f"got {gates.dtype} {list(gates.shape)}"
            )
        for field in ("expert_bytes", "layer_ids"):
            values = getattr(metadata, field)
            if values is not None and len(values) != self.n_layers:
                raise ValueError(
                    f"{self.name}: metadata.{field} must have {self.n_layers} entries, "
                    f"got {len(values)}"
                )

    def _check_content(self) -> None:
        step = max(1, _SCAN_VALUES // (self.n_layers * self.top_k))
        for first in range(0, self.n_rows, step):
            self._scan(first, min(first + step, self.n_rows))
        self._checked[:] = True

    def _scan(self, first: int, last: int) -> None:
        gates = None if self.gate_weights is None else self.gate_weights[first:last]
        scan(self.name, self.expert_ids[first:last], gates, self.n_experts, first)
