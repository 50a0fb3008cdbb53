"""SGLang's expert-distribution recorder in mode ``per_token``: a ``.pt`` per rank.

A record is one forward pass over the tokens of all running requests. It has positions but no ids of
requests: a token continues the one whose next position it has, in batch order where several have.
Written by ``sglang/srt/eplb/expert_distribution.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ndp_gym.importers import torch_file
from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import AS_PROFILE, Source, whole_number
from ndp_gym.importers.vllm import Ids

_EXTEND, _DECODE, _IDLE = 1, 2, 4  # sglang ForwardMode
_MAX_PASSES = 2**40


@dataclass
class _Request:
    """Rows found so far: those of prefill first."""

    offset: int
    rows: list[Ids] = field(default_factory=list)
    n_rows: int = 0
    n_prompt: int = 0

    @property
    def next_position(self) -> int:
        return self.offset + self.n_rows


def detects(source: Source) -> bool:
    """Whether it is a zip as ``torch.save`` writes it."""
    return source.data.startswith(torch_file.MAGIC) and b"data.pkl" in source.data[:4096]


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The requests of one rank's file, ids mapped from physical to logical experts."""
    source = sources[0]
    if len(sources) > 1:
        raise sources[1].fail(
            "recorder files are imported one at a time: ranks of tensor parallelism all record "
            "the same tokens"
        )
    if options.spans:
        raise source.fail("requests are found by position in this format, --spans is not accepted")
    content = torch_file.load(source)
    logical, records = _parts(source, content)
    requests: list[_Request] = []
    waiting: dict[int, list[_Request]] = {}  # by next position
    left = len(source.data)  # numbers that the file can hold; records may name one tensor twice
    for index, record in enumerate(records):
        name = f"{source.path}: record {index}"
        tokens = _tokens(record, name, left, options.top_k)
        left -= tokens[0].size
        _place(requests, waiting, name, *tokens)
    if not requests:
        raise source.fail("holds no token")
    ids = np.concatenate([np.concatenate(request.rows) for request in requests])
    return _recording(source, ids, logical, requests)


def _parts(source: Source, content: Any) -> tuple[Ids, list[Any]]:
    """The physical-to-logical map ``[L, physical]`` and the records in order of passes."""
    if not isinstance(content, dict):
        raise source.fail(f"must hold a dict, got {type(content).__name__}")
    if "logical_count" in content:
        raise source.fail(
            "holds counts per expert (recorder mode stat), not the order of tokens, and cannot be "
            "replayed: record again with --expert-distribution-recorder-mode per_token, or "
            + AS_PROFILE
        )
    records = content.get("records")
    if not isinstance(records, list) or not records:
        raise source.fail("must hold a non-empty list under records")
    if all(isinstance(r, dict) and "topk_ids_of_layer" not in r for r in records):
        raise source.fail(
            "holds counts per forward pass (recorder mode per_pass), not per token, and cannot be "
            "replayed: record again with --expert-distribution-recorder-mode per_token, or "
            + AS_PROFILE
        )
    name = f"{source.path}: last_physical_to_logical_map"
    table = torch_file.array(content.get("last_physical_to_logical_map"), 2, len(source.data), name)
    if table.min() < 0 or table.max() >= 2**16:
        raise ValueError(f"{name} must hold ids in 0..65535, got {table.min()}..{table.max()}")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise source.fail(f"record {index} must be a dict, got {type(record).__name__}")
    keys = [
        whole_number(r.get("forward_pass_id", i), 0, _MAX_PASSES, f"{source.path}: forward_pass_id")
        for i, r in enumerate(records)
    ]
    return table, [records[i] for i in np.argsort(keys, kind="stable")]


def _tokens(
    record: dict[Any, Any], name: str, limit: int, top_k: int | None
) -> tuple[Ids, Ids, list[int], int]:
    """Physical ids ``[tokens, L, K]``, positions, tokens per request and the forward mode."""
    mode = whole_number(record.get("forward_mode"), 0, 32, f"{name}: forward_mode")
    if mode == _IDLE:
        empty = np.zeros((0, 1, 1), dtype=np.int64)
        return empty, np.zeros(0, dtype=np.int64), [], mode
    ids = torch_file.array(record.get("topk_ids_of_layer"), 3, limit, f"{name}: topk_ids_of_layer")
    positions = torch_file.array(record.get("positions"), 1, limit, f"{name}: positions")
    if ids.shape[1] < len(positions) or positions.min() < 0:
        raise ValueError(
            f"{name}: topk_ids_of_layer must be [layers, {len(positions)} tokens, k] with "
            f"positions >= 0, got {list(ids.shape)}"
        )
    ids = ids[:, : len(positions)].transpose(1, 0, 2)
    used = int((ids >= 0).any(axis=(0, 1)).sum())
    ids = ids[:, :, : top_k or max(1, used)]
    lengths = [1] * len(positions)
    if mode != _DECODE:
        given = record.get("extend_seq_lens")
        sizes = torch_file.array(given, 1, limit, f"{name}: extend_seq_lens")
        lengths = sizes.tolist()
        if sizes.min() < 1 or sizes.sum() != len(positions):
            raise ValueError(
                f"{name}: extend_seq_lens must be at least 1 and sum to {len(positions)} tokens, "
                f"got {lengths!s:.80}"
            )
    return ids, positions, lengths, mode


def _place(
    requests: list[_Request],
    waiting: dict[int, list[_Request]],
    name: str,
    ids: Ids,
    positions: Ids,
    lengths: list[int],
    mode: int,
) -> None:
    """Give every run of tokens to the request it continues, or start one."""
    first = 0
    served: list[_Request] = []
    for length in lengths:
        span = slice(first, first + length)
        start = int(positions[first])
        if not np.array_equal(positions[span], np.arange(start, start + length)):
            raise ValueError(f"{name}: positions of a request must ascend by 1 from {start}")
        prefill = mode != _DECODE and (length > 1 or mode == _EXTEND)
        request = _continued(waiting, start, prefill)
        if request is None:
            request = _Request(offset=start)
            requests.append(request)
        if requests[0].rows and requests[0].rows[0].shape[1:] != ids.shape[1:]:
            raise ValueError(
                f"{name} must have {requests[0].rows[0].shape[1]} layers and "
                f"top-{requests[0].rows[0].shape[2]} as before, got {list(ids.shape[1:])}"
            )
        request.rows.append(ids[span])
        request.n_rows += length
        request.n_prompt += length if prefill else 0
        served.append(request)
        first += length
    for request in served:  # only now: a request has one run of tokens in a pass
        waiting.setdefault(request.next_position, []).append(request)


def _continued(waiting: dict[int, list[_Request]], start: int, prefill: bool) -> _Request | None:
    """The first request that waits for position ``start``; prefill continues prefill only."""
    for request in waiting.get(start, []):
        if not prefill or request.n_rows == request.n_prompt > 0:
            waiting[start].remove(request)
            return request
    return None


def _recording(source: Source, ids: Ids, table: Ids, requests: Sequence[_Request]) -> Recording:
    missing = ids < 0
    dense = missing.all(axis=(0, 2))
    if dense.all() or missing[:, ~dense].any() or ids.shape[1] != len(table):
        raise source.fail(
            f"topk_ids_of_layer must be {len(table)} layers, each full or all -1 (dense), "
            f"got {list(ids.shape)} with {int(missing[:, ~dense].sum())} gaps"
        )
    if int(ids.max()) >= table.shape[1]:
        raise source.fail(
            f"physical ids must be in 0..{table.shape[1] - 1} (last_physical_to_logical_map), "
            f"got {ids.max()}"
        )
    layers = np.flatnonzero(~dense)
    logical = table[layers[None, :, None], ids[:, ~dense]]
    warnings = []
    if (table != np.arange(table.shape[1])).any():
        warnings.append(
            "experts were moved or doubled by the engine: ids are mapped by the last map of the "
            "recording, earlier ones may differ"
        )
    return Recording(
        expert_ids=logical,
        segments=[
            Segment(
                n_rows=r.n_rows,
                n_prompt=r.n_prompt,
                context_offset=r.offset,
                conversation=i,
                n_missing=r.offset,  # prefix cache, or the recorder was started later
            )
            for i, r in enumerate(requests)
        ],
        model="unknown",
        id_order="unknown",
        n_experts=int(table.max()) + 1,
        layer_ids=tuple(layers.tolist()),
        warnings=warnings,
    )
