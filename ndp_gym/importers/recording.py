"""What every importer hands over, and how it becomes a ``RoutingTrace``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.known import KnownSource, known_source
from ndp_gym.importers.source import Source
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import (
    N_MISSING,
    PHASES_ASSUMED,
    PHASES_RECORDED,
    PREFILL_ROWS,
    TraceMetadata,
)
from ndp_gym.trace_requests import Requests, assign_splits

_COMPARED_VALUES = 2**22  # ids compared at a time


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says about a recording that its file does not.

    Attributes:
        model: Name of the model, or of a model preset (then layers, E and K are checked).
        licence: Licence of the recording.
        n_experts: Routed experts per layer E.
        top_k: Experts per token K, where the file holds raw ids.
        spans: Rows at which a new request starts, in a file that concatenates requests.
        n_prompt: Prefill rows per request (one number, or one per request).
        drop_prefix: Rows dropped at the start of every request (a shared template).
        keep_loops: Keep the part of a greedy recording that repeats itself.
        seed: Seed of the train/val/test split.
    """

    model: str | None = None
    licence: str | None = None
    n_experts: int | None = None
    top_k: int | None = None
    spans: tuple[int, ...] = ()
    n_prompt: tuple[int, ...] = ()
    drop_prefix: int = 0
    keep_loops: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One request of a recording: consecutive rows.

    Attributes:
        n_rows: Its rows.
        n_prompt: Prefill rows; None = not recorded.
        context_offset: Tokens before its first row, whatever became of their rows.
        conversation: Requests of one conversation share text.
        domain: What it is about.
        n_missing: Its tokens whose routing the source does not hold, before and after its rows.
    """

    n_rows: int
    n_prompt: int | None = None
    context_offset: int = 0
    conversation: int = 0
    domain: str = "unknown"
    n_missing: int = 0


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Rows of one or several foreign files, before they are split and checked.

    Attributes:
        expert_ids: ``[T, L, K]`` int64.
        segments: Requests in row order; together they cover all rows.
        model: The model's name in the file.
        id_order: See ``TraceMetadata``.
        n_experts: E where the file says it.
        gate_weights: ``[T, L, K]`` or None.
        layer_ids: The model's numbers of the routed layers.
        expert_bytes: Bytes of one expert per layer.
        phases: What prefill means where the segments say it.
        warnings: What the user should know.
        loops_cut: Rows that repeat themselves were dropped.
        extra: Further facts for the metadata.
    """

    expert_ids: npt.NDArray[np.int64]
    segments: Sequence[Segment]
    model: str
    id_order: str
    n_experts: int | None = None
    gate_weights: npt.NDArray[np.float64] | None = None
    layer_ids: tuple[int, ...] | None = None
    expert_bytes: tuple[int, ...] | None = None
    phases: str = PHASES_RECORDED
    warnings: Sequence[str] = ()
    loops_cut: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportResult:
    """The trace (in memory, content checked) and what the user should know about it."""

    trace: RoutingTrace
    format: str
    warnings: tuple[str, ...]


def build_trace(
    recording: Recording, sources: Sequence[Source], options: ImportOptions, format_name: str
) -> ImportResult:
    """The recording as a trace: splits assigned, prefill decided, content and spans checked.

    Raises:
        ValueError: Anything in the recording or the options is inconsistent; names the file.
    """
    where = str(sources[0].path)
    warnings = list(recording.warnings)
    known = known_source([source.sha256 for source in sources])
    try:
        segments, phases = _phased(recording, options)
        keep, segments = _without_prefix(segments, options.drop_prefix)
        metadata = _metadata(recording, sources, options, known, phases, format_name, warnings)
        gates = recording.gate_weights
        trace = RoutingTrace.from_arrays(
            recording.expert_ids[keep],
            request_table(segments, options.seed),
            metadata,
            gate_weights=None if gates is None else gates[keep],
        )
        trace.verify()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    warnings += _missing_warning(recording)
    warnings += content_warnings(trace, loops_cut=recording.loops_cut)
    return ImportResult(trace, format_name, tuple(warnings))


def cut_spans(
    n_rows: int, spans: Sequence[int], domains: Sequence[str] = ("unknown",)
) -> list[Segment]:
    """Segments of ``n_rows`` rows that start at 0 and at every span, one conversation each.

    ``spans`` may itself begin with 0.
    """
    edges = [*([] if spans and spans[0] == 0 else [0]), *spans, n_rows]
    if any(after <= before for before, after in pairwise(edges)):
        raise ValueError(f"spans must ascend inside 1..{n_rows - 1}, got {list(spans)}")
    names = list(domains) if len(domains) == len(edges) - 1 else [domains[0]] * (len(edges) - 1)
    return [
        Segment(n_rows=after - before, conversation=index, domain=names[index])
        for index, (before, after) in enumerate(pairwise(edges))
    ]


def _phased(recording: Recording, options: ImportOptions) -> tuple[list[Segment], str]:
    segments = list(recording.segments)
    given = options.n_prompt
    if given:
        if len(given) not in (1, len(segments)):
            raise ValueError(f"n_prompt must be one number or {len(segments)}, got {len(given)}")
        numbers = given if len(given) > 1 else given * len(segments)
        for number, segment in zip(numbers, segments, strict=True):
            if not 0 <= number <= segment.n_rows:
                raise ValueError(f"n_prompt must be in 0..{segment.n_rows}, got {number}")
        pairs = zip(segments, numbers, strict=True)
        return [replace(segment, n_prompt=number) for segment, number in pairs], "given at import"
    if all(segment.n_prompt is not None for segment in segments):
        return segments, recording.phases
    assumed = [
        replace(s, n_prompt=min(PREFILL_ROWS, s.n_rows)) if s.n_prompt is None else s
        for s in segments
    ]
    return assumed, PHASES_ASSUMED


def _without_prefix(
    segments: list[Segment], drop: int
) -> tuple[slice | npt.NDArray[np.bool_], list[Segment]]:
    if drop == 0:
        return slice(None), segments
    shortest = min(segment.n_rows for segment in segments)
    if not 0 <= drop < shortest:
        raise ValueError(f"drop_prefix must be in 0..{shortest - 1} (shortest request), got {drop}")
    keep = np.ones(sum(segment.n_rows for segment in segments), dtype=np.bool_)
    start = 0
    shorter = []
    for segment in segments:
        keep[start : start + drop] = False
        start += segment.n_rows
        shorter.append(
            replace(
                segment,
                n_rows=segment.n_rows - drop,
                n_prompt=max(0, (segment.n_prompt or 0) - drop),
                context_offset=segment.context_offset + drop,
            )
        )
    return keep, shorter


def request_table(segments: Sequence[Segment], seed: int) -> Requests:
    """The table of segments that follow each other, splits dealt out by conversation and domain.

    ``n_prompt`` must be known.
    """

    def column(name: str) -> npt.NDArray[np.int64]:
        return np.array([getattr(segment, name) for segment in segments], dtype=np.int64)

    domains = tuple(sorted({segment.domain for segment in segments}))
    domain = np.array([domains.index(segment.domain) for segment in segments], dtype=np.int64)
    length, conversation = column("n_rows"), column("conversation")
    return Requests(
        start=np.cumsum(length) - length,
        n_prompt=column("n_prompt"),
        length=length,
        context_offset=column("context_offset"),
        conversation=conversation,
        domain=domain,
        split=assign_splits(conversation, domain, seed=seed),
        domains=domains,
    )


def _metadata(
    recording: Recording,
    sources: Sequence[Source],
    options: ImportOptions,
    known: KnownSource | None,
    phases: str,
    format_name: str,
    warnings: list[str],
) -> TraceMetadata:
    shape = recording.expert_ids.shape
    preset = matching_preset(options.model or (known.preset if known else None), *shape[1:])
    if options.model and preset is None:
        warnings.append(
            f"{options.model!r} is not a model preset (ndp-gym list models): taken as a name only, "
            "nothing is checked against it"
        )
    n_experts = options.n_experts or recording.n_experts or (known.n_experts if known else None)
    if n_experts is None and preset is not None:
        n_experts = preset[1]
    if n_experts is None:
        n_experts = max(int(recording.expert_ids.max()) + 1, recording.expert_ids.shape[2])
        warnings.append(
            f"n_experts is not in the file: taken as the largest id + 1 = {n_experts} (--experts)"
        )
    if preset is not None and preset[1] != n_experts:
        raise ValueError(f"model {preset[0]} has {preset[1]} experts per layer, got {n_experts}")
    return TraceMetadata(
        model=options.model or (known.model if known else None) or recording.model,
        preset=preset[0] if preset else None,
        n_experts=n_experts,
        top_k=recording.expert_ids.shape[2],
        source=known.source if known else ", ".join(source.path.name for source in sources),
        licence=options.licence or (known.licence if known else "unknown"),
        recorder=f"imported from {format_name}",
        id_order=recording.id_order,
        phases=phases,
        expert_bytes=recording.expert_bytes,
        layer_ids=recording.layer_ids,
        source_sha256={s.path.name.removesuffix(".gz"): s.sha256 for s in sources},
        extra={**recording.extra, "split_seed": options.seed, **_missing_fact(recording)},
    )


def _missing_fact(recording: Recording) -> dict[str, int]:
    """The entry of ``extra`` that ``trace info`` shows; none where nothing is missing."""
    n_missing = sum(segment.n_missing for segment in recording.segments)
    return {N_MISSING: n_missing} if n_missing else {}


def _missing_warning(recording: Recording) -> list[str]:
    n_missing = sum(segment.n_missing for segment in recording.segments)
    if not n_missing:
        return []
    n_tokens = n_missing + len(recording.expert_ids)
    affected = sum(segment.n_missing > 0 for segment in recording.segments)
    return [
        f"{n_missing:,} of {n_tokens:,} tokens ({n_missing / n_tokens:.1%}, in {affected} of "
        f"{len(recording.segments)} requests) have no recorded routing: not replayed; those before "
        f"the first row of a request count as its context"
    ]


def matching_preset(name: str | None, n_layers: int, top_k: int) -> tuple[str, int] | None:
    """Name and E of the model preset called ``name``; None if there is none of that name.

    Raises:
        ValueError: It has other layers or another K.
    """
    from ndp_gym import presets

    if name is None or name not in presets.names("models"):
        return None
    spec = presets.model(name)
    if (spec.n_layers, spec.top_k) != (n_layers, top_k):
        raise ValueError(
            f"model {name} has {spec.n_layers} routed layers and top_k {spec.top_k}, "
            f"got {n_layers} and {top_k}"
        )
    return name, spec.n_experts


def content_warnings(trace: RoutingTrace, *, loops_cut: bool) -> list[str]:
    """What the user should know about the rows and requests of a trace that is valid."""
    warnings = []
    repeats = _repeated_share(trace)
    if repeats > 0.2:
        warnings.append(
            f"{repeats:.0%} of the rows repeat the row before them in every layer: "
            "warm-up or padding tokens, or a loop?"
        )
    if trace.requests.evaluation_only:
        warnings.append(
            f"fewer than 16 conversations ({trace.requests.n_conversations}): evaluation only, "
            "every request is in split test"
        )
    silent = int((trace.requests.n_decode == 0).sum())
    if silent:
        warnings.append(
            f"{silent} of {len(trace.requests)} requests have no decode rows, and only decode rows "
            "are replayed: give a shorter prompt (--prompt-tokens)"
            + (", or keep the loop (--keep-loops)" if loops_cut else "")
        )
    if trace.metadata.phases == PHASES_ASSUMED:
        warnings.append(f"the prompt is not marked in the file: {PHASES_ASSUMED}")
    return warnings


def _repeated_share(trace: RoutingTrace) -> float:
    """Share of the rows whose sets equal those of the row before, in every layer."""
    step = max(1, _COMPARED_VALUES // (trace.n_layers * trace.top_k))
    n_repeats = 0
    for first in range(0, trace.n_rows - 1, step):
        ids = np.sort(trace.expert_ids[first : first + step + 1], axis=2)
        n_repeats += int((ids[1:] == ids[:-1]).all(axis=(1, 2)).sum())
    return n_repeats / max(1, trace.n_rows - 1)
