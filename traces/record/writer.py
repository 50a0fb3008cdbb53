"""Rows of a recording on disk while it runs: appended request by request, safe to cut off anywhere.

A folder holds two files of raw rows and a journal with a line per finished request. What stands
behind the last whole line of the journal belongs to no request and is dropped at the next start.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_content import id_dtype, scan
from ndp_gym.trace_file import parse_json
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import Requests
from traces.record.hooks import GateArray, IdArray

_IDS, _GATES, _JOURNAL, _FACTS = (
    "expert_ids.bin",
    "gate_weights.bin",
    "requests.jsonl",
    "facts.json",
)
_N_ROWS = "n_rows"


def read_facts(folder: Path) -> dict[str, Any]:
    """What a recording in ``folder`` said about itself when it began, and its shape.

    Raises:
        ValueError: The folder is no such recording.
    """
    path = folder / _FACTS
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of an interrupted recording")
    facts: dict[str, Any] = parse_json(path.read_bytes(), str(path))
    return facts


class Parts:
    """The finished requests of a recording in a folder; used as a context.

    Attributes:
        folder: Where they lie.
        entries: One object per finished request, as given to ``append``, with ``n_rows``.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int], n_experts: int, facts: Mapping[str, Any]
    ) -> None:
        """Open the parts in ``folder``, or start new ones.

        Args:
            folder: Made if it does not exist.
            shape: Layers L and experts per token K.
            n_experts: Experts per layer E.
            facts: What a continued recording must have in common with the one before (JSON values).

        Raises:
            ValueError: The folder holds other things, or parts of another recording.
        """
        self.folder = folder
        self._shape = shape
        self._n_experts = n_experts
        folder.mkdir(exist_ok=True)
        self._agree_on({**facts, "n_layers": shape[0], "top_k": shape[1], "n_experts": n_experts})
        self.entries: list[dict[str, Any]] = self._read_journal()
        n_values = sum(entry[_N_ROWS] for entry in self.entries) * shape[0] * shape[1]
        self._ids = self._open_rows(_IDS, n_values * id_dtype(n_experts).itemsize)
        self._gates = self._open_rows(_GATES, n_values * 2)
        self._journal = (folder / _JOURNAL).open("ab")

    def __enter__(self) -> "Parts":
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; they stay."""
        for file in (self._ids, self._gates, self._journal):
            file.close()

    def append(self, ids: IdArray, gates: GateArray, entry: Mapping[str, Any]) -> None:
        """Write the rows ``[n, L, K]`` of a finished request, then its line in the journal.

        Raises:
            ValueError: Rows of another shape or type, or content that no trace may hold.
        """
        wanted = (len(ids), *self._shape)
        if ids.shape != wanted or gates.shape != wanted or ids.dtype != id_dtype(self._n_experts):
            raise ValueError(
                f"rows must be {id_dtype(self._n_experts)} [n, L, K] = {list(wanted)} with gate "
                f"weights, got {ids.dtype} {list(ids.shape)} and {list(gates.shape)}"
            )
        scan(f"request {len(self.entries) + 1}", ids, gates, self._n_experts, 0)
        for file, rows in ((self._ids, ids), (self._gates, gates)):
            file.write(np.ascontiguousarray(rows).tobytes())
            _to_disk(file)
        whole = {**entry, _N_ROWS: len(ids)}
        self._journal.write(json.dumps(whole, allow_nan=False).encode() + b"\n")
        _to_disk(self._journal)
        self.entries.append(whole)

    def trace(self, requests: Requests, metadata: TraceMetadata) -> RoutingTrace:
        """The finished requests as a trace whose rows stay on disk; ``save`` streams them."""
        shape = (sum(entry[_N_ROWS] for entry in self.entries), *self._shape)
        ids = np.memmap(self.folder / _IDS, id_dtype(self._n_experts), mode="r", shape=shape)
        gates = np.memmap(self.folder / _GATES, np.float16, mode="r", shape=shape)
        return RoutingTrace(ids.view(np.ndarray), gates.view(np.ndarray), requests, metadata)

    def remove(self) -> None:
        """Delete the folder after its content was saved elsewhere."""
        for name in (_JOURNAL, _IDS, _GATES, _FACTS):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _agree_on(self, facts: dict[str, Any]) -> None:
        path = self.folder / _FACTS
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            if {file.name for file in self.folder.iterdir()} - {temporary.name}:
                raise ValueError(f"{self.folder}: must be empty or hold {_FACTS} of a recording")
            temporary.write_text(json.dumps(facts, sort_keys=True, indent=1), encoding="utf-8")
            os.replace(temporary, path)
            return
        before = read_facts(self.folder)
        for name, value in json.loads(json.dumps(facts)).items():
            if different := _difference(name, before.get(name), value):
                name, old, new = different
                raise ValueError(
                    f"{self.folder}: {name} must be {old!r:.80} as in the recording that is "
                    f"continued, got {new!r:.80}"
                )

    def _read_journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal whose rows are on disk; cuts off what follows them."""
        path = self.folder / _JOURNAL
        path.touch()
        per_row = self._shape[0] * self._shape[1]
        n_ids, n_gates = (
            (self.folder / name).stat().st_size // (per_row * n_bytes)
            if (self.folder / name).exists()
            else 0
            for name, n_bytes in ((_IDS, id_dtype(self._n_experts).itemsize), (_GATES, 2))
        )
        entries, n_bytes, n_rows = [], 0, 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entry = parse_json(line, str(path))
            n_rows += entry[_N_ROWS]
            if n_rows > min(n_ids, n_gates):
                break
            entries.append(entry)
            n_bytes += len(line)
        os.truncate(path, n_bytes)
        return entries

    def _open_rows(self, name: str, n_bytes: int) -> Any:
        path = self.folder / name
        path.touch()
        os.truncate(path, n_bytes)
        return path.open("ab")


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _difference(name: str, old: object, new: object) -> tuple[str, object, object] | None:
    """Name and values of the first entry in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old | new):
            if found := _difference(f"{name}.{key}", old.get(key), new.get(key)):
                return found
        return None
    return None if old == new else (name, old, new)
