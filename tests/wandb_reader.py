"""Reads an offline ``run-*.wandb`` file back: a log of protobuf records, every CRC checked."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class LoggedArtifact:
    """What an artifact is; ``files`` maps their names to the copies that wait for an upload."""

    type: str
    name: str
    metadata: dict[str, Any]
    files: dict[str, Path]


@dataclass
class LoggedRun:
    """What a run logged; ``exit_code`` is None where it never finished."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[LoggedArtifact] = field(default_factory=list)
    exit_code: int | None = None


def payloads(data: bytes) -> Iterator[bytes]:
    """The logical records of a ``.wandb`` file; raises ``ValueError`` on any damage."""
    if data[:4] != b":W&B" or struct.unpack("<H", data[4:6])[0] != 0xBEE1:
        raise ValueError("not a .wandb file")
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER or data[position : position + HEADER] == bytes(HEADER):
            position += BLOCK - position % BLOCK
            continue
        crc, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        chunk = data[position + HEADER : position + HEADER + length]
        if len(chunk) != length or zlib.crc32(bytes([kind]) + chunk) != crc:
            raise ValueError(f"damaged record at byte {position}")
        position += HEADER + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts


def read_run(folder: Path, *, wait_s: float = 30.0) -> LoggedRun:
    """The one run logged under ``folder``, complete: wandb's writer may lag behind ``finish``."""
    (path,) = (p for p in folder.rglob("run-*.wandb") if "latest-run" not in p.parts)
    deadline = time.monotonic() + wait_s
    while True:
        late = time.monotonic() > deadline
        with suppress(*([] if late else [ValueError])):  # the last record may be half written
            run = _read(path)
            if late or run.exit_code is not None:
                return run
        time.sleep(0.05)


def _read(path: Path) -> LoggedRun:
    from wandb.proto import wandb_internal_pb2

    run = LoggedRun()
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "artifact":
            run.artifacts.append(_artifact(record.artifact))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _artifact(record: Any) -> LoggedArtifact:
    files = {entry.path: Path(entry.local_path) for entry in record.manifest.contents}
    return LoggedArtifact(record.type, record.name, json.loads(record.metadata or "{}"), files)


def _items(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
