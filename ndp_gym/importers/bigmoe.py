"""BigMoeOnEdge ``*.route.csv`` (``route_trace v1``): one row per token, layer and rank.

Gate weights and per-layer expert bytes are in the file; prefill is written layer by layer, decode
token by token, so rows are placed by their keys and never by position.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source

MARK = b"# route_trace v1"
_KEYS = ("turn", "phase", "step", "layer", "slot", "expert")
_MAX = 2**31 - 1

Ints = npt.NDArray[np.int64]


def detects(source: Source) -> bool:
    """Whether the first line is the format's mark."""
    return source.data.lstrip().startswith(MARK)


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The tokens of one file; every turn is a request of one conversation."""
    if len(sources) > 1:
        raise sources[1].fail("route CSV files are imported one at a time")
    source = sources[0]
    if options.spans:
        raise source.fail("requests are marked in this format, --spans is not accepted")
    facts, layer_bytes, header, rows = _parse(source)
    columns, weights = _columns(source, header, rows)
    ids, gates, tokens, layers = _place(source, columns, weights)
    if facts.get("n_expert_used") not in (None, str(ids.shape[2])):
        raise source.fail(
            f"n_expert_used is {facts['n_expert_used']}, but rows have {ids.shape[2]} slots"
        )
    warnings = []
    if np.isnan(gates).any():
        warnings.append("some gate weights are unknown (nan): imported without gate weights")
    sizes = tuple(layer_bytes.get(int(layer), 0) for layer in layers)
    return Recording(
        expert_ids=ids,
        segments=_requests(source, tokens),
        model=facts.get("model", "unknown").rsplit("/", 1)[-1].removesuffix(".gguf"),
        id_order="router_rank",
        n_experts=_number(source, "n_expert", facts["n_expert"], 2**16)
        if "n_expert" in facts
        else None,
        gate_weights=None if warnings else gates,
        layer_ids=tuple(int(layer) for layer in layers),
        expert_bytes=sizes if all(sizes) else None,
        warnings=warnings,
    )


def _parse(source: Source) -> tuple[dict[str, str], dict[int, int], list[str], list[list[str]]]:
    """Facts of the comment lines, expert bytes by layer, column names, cells."""
    try:
        lines = source.data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise source.fail(f"must be ASCII text, got byte {source.data[error.start]:#x}") from None
    facts: dict[str, str] = {}
    layer_bytes: dict[int, int] = {}
    body = []
    for line in lines:
        if not line.startswith("#"):
            body.append(line.split(","))
            continue
        pairs = dict(part.split("=", 1) for part in line[1:].split() if "=" in part)
        if "layer" in pairs:
            layer = _number(source, "layer", pairs["layer"], 2**16)
            layer_bytes[layer] = _number(
                source, "expert_bytes", pairs.get("expert_bytes", ""), 2**48
            )
        else:
            facts |= pairs
    if len(body) < 2:
        raise source.fail("must hold a header line and at least one row")
    return facts, layer_bytes, body[0], body[1:]


def _number(source: Source, name: str, text: str, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16) or int(text) > high:
        raise source.fail(f"{name} must be a whole number in 0..{high}, got {text[:40]!r}")
    return int(text)


def _columns(
    source: Source, header: list[str], rows: list[list[str]]
) -> tuple[dict[str, Ints], npt.NDArray[np.float64]]:
    missing = [name for name in (*_KEYS, "weight") if name not in header]
    if missing or len(set(header)) != len(header):
        raise source.fail(
            f"columns must include {', '.join((*_KEYS, 'weight'))}, got {header!r:.120}"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise source.fail(f"row {number} must have {len(header)} cells, got {len(row)}")
    columns: dict[str, Ints] = {}
    for name in _KEYS:
        at = header.index(name)
        values = [
            _number(source, f"{name} of row {i}", row[at], _MAX) for i, row in enumerate(rows, 1)
        ]
        columns[name] = np.array(values, dtype=np.int64)
    if (columns["phase"] > 1).any():
        raise source.fail(f"phase must be 0 (prefill) or 1 (decode), got {columns['phase'].max()}")
    at = header.index("weight")
    return columns, np.array([_weight(source, i, row[at]) for i, row in enumerate(rows, 1)])


def _weight(source: Source, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0 or value == float("inf"):
        raise source.fail(f"weight of row {number} must be a number >= 0 or nan, got {text[:40]!r}")
    return value


def _place(
    source: Source, columns: dict[str, Ints], weights: npt.NDArray[np.float64]
) -> tuple[Ints, npt.NDArray[np.float64], Ints, Ints]:
    """Ids and gates ``[T, L, K]`` in order of (turn, phase, step), those keys, and the layers."""
    keys = np.stack([columns[name] for name in ("turn", "phase", "step")], axis=1)
    tokens, row_of = np.unique(keys, axis=0, return_inverse=True)
    layers, layer_of = np.unique(columns["layer"], return_inverse=True)
    shape = (len(tokens), len(layers), int(columns["slot"].max()) + 1)
    if np.prod([float(n) for n in shape]) != len(weights):
        raise source.fail(
            f"must hold one row per token, layer and slot ({shape[0]} x {shape[1]} x {shape[2]}), "
            f"got {len(weights)} rows: truncated, or a layer that was recorded for some tokens only"
        )
    ids = np.full(shape, -1, dtype=np.int64)
    gates = np.zeros(shape)
    place: Any = (row_of.reshape(-1), layer_of.reshape(-1), columns["slot"])
    ids[place] = columns["expert"]
    gates[place] = weights
    if (ids < 0).any():
        token, layer, slot = (int(axis[0]) for axis in np.nonzero(ids < 0))
        raise source.fail(
            f"must name every (turn, phase, step, layer, slot) once, got none for "
            f"{(*tokens[token].tolist(), int(layers[layer]), slot)}"
        )
    return ids, gates, tokens, layers


def _requests(source: Source, tokens: Ints) -> list[Segment]:
    segments = []
    next_step = 0
    for turn in np.unique(tokens[:, 0]):
        own = tokens[tokens[:, 0] == turn]
        if (np.diff(own[:, 2]) != 1).any():
            raise source.fail(f"steps of turn {turn} must be consecutive, prefill before decode")
        segments.append(
            Segment(
                n_rows=len(own),
                n_prompt=int((own[:, 1] == 0).sum()),
                context_offset=int(own[0, 2]),
                n_missing=max(0, int(own[0, 2]) - next_step),
            )
        )
        next_step = int(own[-1, 2]) + 1
    return segments
