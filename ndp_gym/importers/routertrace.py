"""RouterTrace v2 JSON (stratamoe-lab): ``selections[token][layer][rank]``.

No phase and no weights. Prompt spans stand in a ``capture-metadata.json`` beside the file. Schema:
ROUTER_TRACE_SCHEMA.md of Labeeb2339/stratamoe-lab.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ndp_gym.importers.recording import ImportOptions, Recording, Segment, cut_spans
from ndp_gym.importers.source import Source, integers, open_source, whole_number

SIDECAR = "capture-metadata.json"
SIDECARS = (SIDECAR, "prompt-manifest.json")


def detects(source: Source) -> bool:
    """Whether the content is an object with selections."""
    return source.data.lstrip()[:1] == b"{" and b'"selections"' in source.data


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """The tokens of one file, all of them prefill, a request per prompt."""
    if len(sources) > 1:
        raise sources[1].fail("RouterTrace files are imported one at a time")
    source = sources[0]
    content = source.json
    if not isinstance(content, dict):
        raise source.fail("must be a JSON object")
    if content.get("version") != 2:
        raise source.fail(f"version must be 2, got {content.get('version')!r:.80}")
    ids = integers(content.get("selections"), 3, f"{source.path}: selections")
    for key, size in zip(("tokens", "layers", "topK"), ids.shape, strict=True):
        if content.get(key) != size:
            raise source.fail(f"{key} must match selections ({size}), got {content.get(key)!r:.80}")
    n_experts = whole_number(
        content.get("expertsPerLayer"), 1, 2**16, f"{source.path}: expertsPerLayer"
    )
    origin = content.get("source")
    segments, warnings = _spans(source, len(ids), options)
    return Recording(
        expert_ids=ids,
        segments=segments,
        model=_model(origin),
        id_order="router_rank" if ids.shape[2] > 1 else "unknown",
        n_experts=n_experts,
        phases="no phase in the file: every row taken as prefill",
        warnings=warnings,
        extra={"source": origin} if isinstance(origin, dict) else {},
    )


def _model(origin: Any) -> str:
    model = origin.get("model") if isinstance(origin, dict) else None
    name = model.get("id") if isinstance(model, dict) else None
    return name if isinstance(name, str) else "unknown"


def _spans(source: Source, n_rows: int, options: ImportOptions) -> tuple[list[Segment], list[str]]:
    sidecar = source.path.with_name(SIDECAR)
    if options.spans:
        segments = cut_spans(n_rows, options.spans)
    elif sidecar.is_file():
        segments = _sidecar_spans(open_source(sidecar), n_rows)
    else:
        segments = [Segment(n_rows=n_rows)]
    known = bool(options.spans) or sidecar.is_file()
    warnings = [] if known else [f"no {SIDECAR} beside the file: taken as one request (--spans)"]
    return [
        Segment(n_rows=s.n_rows, n_prompt=s.n_rows, conversation=s.conversation, domain=s.domain)
        for s in segments
    ], warnings


def _sidecar_spans(sidecar: Source, n_rows: int) -> list[Segment]:
    content = sidecar.json
    spans = content.get("prompt_spans") if isinstance(content, dict) else None
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise sidecar.fail("prompt_spans must be a list of objects")
    edges = integers(
        [[span.get("token_start"), span.get("token_end_exclusive")] for span in spans],
        2,
        f"{sidecar.path}: prompt_spans",
    )
    expected = np.concatenate([[0], edges[:-1, 1]])
    if (
        (edges[:, 0] != expected).any()
        or edges[-1, 1] != n_rows
        or (edges[:, 1] <= edges[:, 0]).any()
    ):
        raise sidecar.fail(f"prompt_spans must cover the {n_rows} tokens in order without gaps")
    names = [str(span.get("id", "unknown")).rsplit("-", 1)[0] for span in spans]
    return [
        Segment(n_rows=int(end - start), conversation=index, domain=names[index])
        for index, (start, end) in enumerate(edges)
    ]
