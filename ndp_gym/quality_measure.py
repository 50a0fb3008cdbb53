"""Measure what a checkpoint's experts lose at each bitwidth, layer by layer.

The error of an expert is the mean of the relative squared errors of its gate, up and down matrix:
``kappa`` belongs to errors of single matrices, and the three contribute equally to an expert's
output error (1.07 : 1 : 1 on random SwiGLU experts). One tensor slice is in memory at a time.
Finished layers are kept in a file beside the result, so that an interrupted measurement goes on.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ndp_gym.checkpoint import Checkpoint
from ndp_gym.expert_weights import ExpertWeights, find_experts
from ndp_gym.quality_file import Floats, QualityFile
from ndp_gym.quantizers import GROUP, MAX_BITS, relative_error, stored_bits_per_weight
from ndp_gym.trace_file import parse_json

__all__ = ["BITS", "measure"]

BITS = (8, 4, 3, 2, 1)
METHOD = "clip_search"

Progress = Callable[[int, int], None]
"""Called with the experts measured so far, and those of the whole checkpoint."""


def measure(
    weights: Path,
    out: Path,
    *,
    bits: Sequence[int] = BITS,
    group: int = GROUP,
    name: str | None = None,
    shape: tuple[int, int] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> QualityFile:
    """Measure every expert and write ``out``; goes on where an interrupted call stopped.

    Args:
        weights: safetensors file, index file or folder (`ndp_gym.checkpoint`).
        out: the file to write; finished layers stand in ``out`` + ``.part`` until it is.
        bits: widths, any order.
        group: weights that share a scale, at most.
        name: of the model; default the name of ``weights``.
        shape: routed layers and experts that the checkpoint must have.
        threads: how many threads share a matrix; changes no number.
        progress: called after every expert.

    Raises:
        ValueError: no experts, other layers or experts than ``shape``, damaged or quantized
            weights, numbers that are not finite, or a part file of another measurement.
        OSError: a file cannot be read or written.
    """
    widths = tuple(sorted(set(bits), reverse=True))
    if not widths or widths[0] > MAX_BITS or widths[-1] < 1:
        raise ValueError(
            f"bits must be in 1..{MAX_BITS}, got {', '.join(map(str, bits)) or 'none'}"
        )
    if group < 1 or threads < 1:
        raise ValueError(f"group and threads must be >= 1, got {group} and {threads}")
    checkpoint = Checkpoint.open(weights)
    experts = find_experts(checkpoint)
    found = (len(experts.layers), experts.n_experts)
    if shape is not None and found != shape:
        raise ValueError(
            f"{weights}: must have {shape[0]} routed layers x {shape[1]} experts, "
            f"got {found[0]} x {found[1]}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with _Part(out, _task(checkpoint, widths, group)) as part, ThreadPoolExecutor(threads) as pool:
        for layer in experts.layers[len(part.layers) :]:
            errors = []
            for expert in range(experts.n_experts):
                errors.append(_errors(experts, layer, expert, widths, group, pool))
                if progress is not None:
                    n_done = len(part.layers) * experts.n_experts + len(errors)
                    progress(n_done, len(experts.layers) * experts.n_experts)
            part.add(errors)
    result = QualityFile(
        relative_error=np.array(part.layers),
        stored_bits=_stored_bits(experts, widths, group),
        bits=widths,
        method=METHOD,
        group=group,
        model=name or weights.resolve().stem,
        layers=experts.layers,
        sources=checkpoint.sources,
    )
    result.save(out)
    part.path.unlink()
    return result


def _errors(
    experts: ExpertWeights,
    layer: int,
    expert: int,
    widths: Sequence[int],
    group: int,
    pool: ThreadPoolExecutor,
) -> list[float]:
    """Error of one expert at every width."""
    matrices = []
    for name, matrix in experts.matrices(layer, expert):
        try:
            matrices.append([relative_error(matrix, bits, group, pool) for bits in widths])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        del matrix  # before the next is read
    return [sum(column) / len(matrices) for column in zip(*matrices, strict=True)]


def _stored_bits(experts: ExpertWeights, widths: Sequence[int], group: int) -> Floats:
    """Bits per weight with scales and zero points at every width, over all experts."""
    counts = Counter(experts.shapes())
    n_weights = [rows * columns * n for (rows, columns), n in counts.items()]
    stored = [
        [stored_bits_per_weight(columns, bits, group) for _, columns in counts] for bits in widths
    ]
    return np.asarray(stored) @ n_weights / sum(n_weights)


def _task(checkpoint: Checkpoint, widths: Sequence[int], group: int) -> dict[str, Any]:
    """What a part file must agree with; times of files tell weights of the same layout apart."""
    times = [path.stat().st_mtime_ns for path in checkpoint.paths]
    return {
        "kind": "part of ndp-gym quality measure",
        "method": METHOD,
        "bits": list(widths),
        "group": group,
        "sources": list(checkpoint.sources),
        "mtime_ns": times,
    }


class _Part:
    """The finished layers, one line of JSON each, after a first line that names the task."""

    def __init__(self, out: Path, task: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.part")
        self.layers: list[list[list[float]]] = []
        self._task = task

    def __enter__(self) -> "_Part":
        """Read what is finished; a line that was cut off is dropped."""
        whole = b""
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
        if whole:
            task, *layers = [parse_json(line, str(self.path)) for line in whole.splitlines()]
            if task != self._task:
                raise ValueError(
                    f"{self.path}: is of other weights, bits or group: remove it, or write "
                    "another file"
                )
            self.layers = layers
        self._file = self.path.open("r+b" if self.path.exists() else "xb")
        self._file.seek(len(whole))
        self._file.truncate()
        if not whole:
            self._write(self._task)
        return self

    def add(self, layer: list[list[float]]) -> None:
        """Keep a finished layer [E][NB]."""
        self._write(layer)
        self.layers.append(layer)

    def _write(self, content: object) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *_: object) -> None:
        """Close the file, which stays until the result is written."""
        self._file.close()
