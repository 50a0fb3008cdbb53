"""nvmoe ``*.tokens.jsonl``: one line per token, ``[[layer, expert], …]``, experts in rank order.

Layers ascend and keep the model's own numbers. Decode tokens only; the file has no request spans.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.known import known_source
from ndp_gym.importers.recording import ImportOptions, Recording, Segment, cut_spans
from ndp_gym.importers.source import Source, integers
from ndp_gym.trace_file import parse_json


def detects(source: Source) -> bool:
    """Whether the first line is a list of pairs."""
    head = source.lines[0].replace(b" ", b"")
    return head.startswith(b"[[") and not head.startswith(b"[[[")


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """Rows of the files one after the other; requests by ``--spans`` or as published."""
    if options.spans and len(sources) > 1:
        raise ValueError(f"spans must be given for one file at a time, got {len(sources)} files")
    parts = [_read_one(source) for source in sources]
    layer_ids = parts[0][1]
    segments: list[Segment] = []
    warnings = []
    for source, (ids, layers) in zip(sources, parts, strict=True):
        if layers != layer_ids or ids.shape[1:] != parts[0][0].shape[1:]:
            raise source.fail(
                f"must have the layers and top-k of {sources[0].path.name}, "
                f"got {len(layers)} layers, top-{ids.shape[2]}"
            )
        known = known_source([source.sha256])
        spans = options.spans or (known.spans if known else ())
        if not spans:
            warnings.append(
                f"{source.path.name}: request spans are not in the file: taken as one request "
                "(--spans)"
            )
        domains = known.domains if known and known.domains else (source.stem.split(".")[0],)
        try:
            new = cut_spans(len(ids), spans, domains)
        except ValueError as error:
            raise source.fail(str(error)) from None
        offset = len(segments)
        segments += [
            Segment(n_rows=s.n_rows, conversation=s.conversation + offset, domain=s.domain)
            for s in new
        ]
    return Recording(
        expert_ids=np.concatenate([ids for ids, _ in parts]),
        segments=segments,
        model=sources[0].stem.split(".")[0],
        id_order="router_rank",
        layer_ids=layer_ids,
        warnings=warnings,
    )


def _read_one(source: Source) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    rows = []
    layers: npt.NDArray[np.int64] | None = None
    for number, line in enumerate(source.lines, start=1):
        where = f"{source.path}: line {number}"
        pairs = integers(parse_json(line, where), 2, where)
        if pairs.shape[1] != 2:
            raise ValueError(
                f"{where} must hold [layer, expert] pairs, got {pairs.shape[1]} numbers"
            )
        if layers is None:
            layers = pairs[:, 0]
        if pairs.shape[0] != len(layers) or (pairs[:, 0] != layers).any():
            raise ValueError(
                f"{where} must list the same {len(layers)} layers as line 1, "
                f"got {pairs.shape[0]} pairs"
            )
        rows.append(pairs[:, 1])
    assert layers is not None  # open_source refuses empty files
    numbers, counts = np.unique(layers, return_counts=True)
    top_k = int(counts[0])
    if (counts != top_k).any() or (layers != np.repeat(numbers, top_k)).any():
        raise source.fail(
            f"line 1 must list each layer in ascending order with the same number of experts, "
            f"got {counts.min()} to {counts.max()}"
        )
    return np.stack(rows).reshape(len(rows), len(numbers), top_k), tuple(numbers.tolist())
