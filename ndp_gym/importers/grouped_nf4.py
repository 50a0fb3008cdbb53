"""grouped-nf4 ``*.jsonl``: a meta line, then ``{"step": i, "routed": {"<layer>": [ids]}}``.

Greedy decoding of base models: they fall into loops, which inflates locality, so the part after the
first loop is dropped unless asked for.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source, integers, whole_number
from ndp_gym.trace_file import parse_json
from ndp_gym.trace_loops import loop_free_rows

_NO_E = {"granite": 40}  # "n_experts": null in the published Granite files


def detects(source: Source) -> bool:
    """Whether the first line is the format's meta line."""
    return re.match(rb'\s*\{\s*"meta"\s*:', source.data) is not None


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The decode steps of every file, one request each."""
    if options.spans:
        raise sources[0].fail("a file is one request in this format, --spans is not accepted")
    parts: list[npt.NDArray[np.int64]] = []
    segments: list[Segment] = []
    warnings: list[str] = []
    loops_cut = False
    first = _meta(sources[0])
    for index, source in enumerate(sources):
        meta = _meta(source)
        for key in ("model", "layers", "top_k", "n_experts"):
            if meta.get(key) != first.get(key):
                raise source.fail(
                    f"meta.{key} must be {first.get(key)!r:.80} as in {sources[0].path.name}, "
                    f"got {meta.get(key)!r:.80}"
                )
        ids = _steps(source, meta)
        kept = len(ids) if options.keep_loops else loop_free_rows(ids)
        if kept < len(ids):
            loops_cut = True
            warnings.append(
                f"{source.path.name}: repeats itself from step {kept} on: {len(ids) - kept} of "
                f"{len(ids)} steps dropped (--keep-loops keeps them)"
            )
        parts.append(ids[:kept])
        offset = whole_number(
            meta.get("prompt_tokens", 0), 0, 2**31, f"{source.path}: meta.prompt_tokens"
        )
        segments.append(
            Segment(
                n_rows=kept,
                context_offset=offset,
                n_missing=offset,
                conversation=index,
                domain=str(meta.get("prompt", "unknown")),
            )
        )
    name = str(first.get("model", "unknown")).rsplit("/", 1)[-1]
    n_experts = first.get("n_experts")
    if n_experts is not None:
        n_experts = whole_number(n_experts, 1, 2**16, f"{sources[0].path}: meta.n_experts")
    return Recording(
        expert_ids=np.concatenate(parts),
        segments=segments,
        model=name,
        id_order="ascending",
        n_experts=n_experts or _NO_E.get(name),
        warnings=warnings,
        loops_cut=loops_cut,
    )


def _meta(source: Source) -> dict[str, Any]:
    line = parse_json(source.lines[0], f"{source.path}: line 1")
    meta = line.get("meta") if isinstance(line, dict) else None
    if not isinstance(meta, dict):
        raise source.fail("line 1 must hold an object under meta")
    for key, most in (("layers", 2**16), ("top_k", 32), ("steps", 2**24)):
        whole_number(meta.get(key), 1, most, f"{source.path}: meta.{key}")
    return meta


def _steps(source: Source, meta: dict[str, Any]) -> npt.NDArray[np.int64]:
    n_layers, top_k = meta["layers"], meta["top_k"]
    if len(source.lines) - 1 != meta["steps"]:
        raise source.fail(
            f"must hold meta.steps={meta['steps']} steps, got {len(source.lines) - 1}"
        )
    rows = []
    for number, line in enumerate(source.lines[1:]):
        where = f"{source.path}: step {number}"
        step = parse_json(line, where)
        routed = step.get("routed") if isinstance(step, dict) else None
        if not isinstance(routed, dict) or step.get("step") != number:
            raise ValueError(f"{where} must hold its number and an object under routed")
        if len(routed) != n_layers or not all(str(i) in routed for i in range(n_layers)):
            raise ValueError(
                f"{where} must name the layers 0..{n_layers - 1}, got {len(routed)} layers"
            )
        ids = integers([routed[str(i)] for i in range(n_layers)], 2, where)
        if ids.shape[1] != top_k:
            raise ValueError(
                f"{where} must have top_k={top_k} experts per layer, got {ids.shape[1]}"
            )
        rows.append(ids)
    return np.stack(rows)
