"""``token,layer,expert`` CSV, as tools around llama.cpp's eval callback write it.

One row per token, layer and rank, in any order of tokens and layers; ranks in file order. Other
columns are ignored. llama.cpp may compute the last layer of a prompt for its last token only, so
tokens at the start that lack layers are dropped.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ndp_gym.importers.recording import ImportOptions, Recording, cut_spans
from ndp_gym.importers.source import Source
from ndp_gym.importers.vllm import Ids

_COLUMNS = (b"token", b"layer", b"expert")
_MAX = 2**31 - 1


def detects(source: Source) -> bool:
    """Whether the first line names the three columns."""
    return set(_COLUMNS) <= set(_cells(source.lines[0])) if source.lines else False


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The tokens of one file, in order of their number."""
    source = sources[0]
    if len(sources) > 1:
        raise sources[1].fail("token,layer,expert files are imported one at a time")
    rows = _rows(source)
    ids, layers, n_dropped = _grouped(source, rows)
    warnings = []
    if n_dropped:
        warnings.append(
            f"{n_dropped} tokens at the start lack layers (llama.cpp skips the last layer of a "
            f"prompt): dropped"
        )
    if not options.spans:
        warnings.append("requests are not marked in this format: taken as one (--spans)")
    segments = cut_spans(len(ids), options.spans)
    if n_dropped:
        segments[0] = replace(segments[0], context_offset=n_dropped, n_missing=n_dropped)
    return Recording(
        expert_ids=ids,
        segments=segments,
        model="unknown",
        id_order="router_rank",
        layer_ids=layers,
        warnings=warnings,
    )


def _cells(line: bytes) -> list[bytes]:
    return [cell.strip() for cell in line.split(b",")]


def _rows(source: Source) -> Ids:
    """Token, layer and expert of every row ``[n, 3]``."""
    header = _cells(source.lines[0])
    if any(header.count(name) != 1 for name in _COLUMNS):
        raise source.fail(f"columns must include token, layer and expert once, got {header!r:.100}")
    places = [header.index(name) for name in _COLUMNS]
    rows = []
    for number, line in enumerate(source.lines[1:], 1):
        cells = _cells(line)
        if len(cells) != len(header):
            raise source.fail(f"row {number} must have {len(header)} cells, got {len(cells)}")
        picked = [cells[place] for place in places]
        if not all(cell.isdigit() and len(cell) < 11 and int(cell) <= _MAX for cell in picked):
            raise source.fail(
                f"row {number} must hold whole numbers below 2**31, got {picked!r:.80}"
            )
        rows.append([int(cell) for cell in picked])
    if not rows:
        raise source.fail("must hold at least one row")
    return np.array(rows, dtype=np.int64)


def _grouped(source: Source, rows: Ids) -> tuple[Ids, tuple[int, ...], int]:
    """Ids ``[T, L, K]``, layer numbers, and the tokens dropped at the start."""
    tokens, token_of = np.unique(rows[:, 0], return_inverse=True)
    layers, layer_of = np.unique(rows[:, 1], return_inverse=True)
    if len(tokens) * len(layers) > 4 * len(rows):
        raise source.fail(
            f"must hold every layer of every token, got {len(rows)} rows for {len(tokens)} tokens "
            f"and {len(layers)} layers"
        )
    cell = token_of.reshape(-1) * len(layers) + layer_of.reshape(-1)
    counts = np.bincount(cell, minlength=len(tokens) * len(layers)).reshape(len(tokens), -1)
    top_k = int(counts[-1, 0])
    whole = (counts == top_k).all(axis=1)
    first = int(np.argmax(whole))
    if not whole[first:].all() or (counts[:first] > top_k).any():
        token = int(tokens[first + int(np.argmin(whole[first:]))])
        raise source.fail(
            f"token {token} must have {top_k} experts in each of {len(layers)} layers like the "
            f"last one; tokens of a second request must be numbered on"
        )
    order = np.argsort(cell, kind="stable")
    kept = rows[order][cell[order] >= first * len(layers), 2]
    return kept.reshape(-1, len(layers), top_k), tuple(layers.tolist()), first
