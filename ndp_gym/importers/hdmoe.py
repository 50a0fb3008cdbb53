"""HD-MoE ``experts_<domain>_mixtral.json``: ``{"<layer>": [[expert, expert], … per token]}``.

A file concatenates MT-Bench requests without marks: 5 questions of 2 turns, each request starting
with the same 526-token template, and turn 2 prefilling all of turn 1 again. A request starts
where all expert sets equal those of row 0; sets, not ordered pairs, since ranks swap by jitter.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source, integers

PREFIX = 526
_SAME_TURN = 0.7  # share of sets on which turn 2 repeats turn 1; .83 in the worst published pair

Ids = npt.NDArray[np.int64]


def detects(source: Source) -> bool:
    """Whether the content is an object whose keys are layer numbers."""
    head = source.data[:64].replace(b" ", b"").lstrip()
    return head[:2] == b'{"' and head[2:].split(b'"', 1)[0].isdigit()


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """All segments (question and answer) of the files, in order of the files."""
    if options.spans:
        raise sources[0].fail("spans are found by rule in this format, --spans is not accepted")
    parts: list[Ids] = []
    segments: list[Segment] = []
    warnings: list[str] = []
    n_conversations = 0
    for source in sources:
        ids = read_layers(source)
        if parts and ids.shape[1:] != parts[0].shape[1:]:
            raise source.fail(
                f"must have {parts[0].shape[1]} layers, top-{parts[0].shape[2]} like "
                f"{sources[0].path.name}, got {ids.shape[1]}, top-{ids.shape[2]}"
            )
        found = _segments(source, ids)
        warnings.append(_dropped(source, len(ids), found))
        for first, last, context, turn in found:
            parts.append(ids[first:last])
            conversation = n_conversations + turn // 2
            segments.append(
                Segment(
                    n_rows=last - first,
                    context_offset=context,
                    conversation=conversation,
                    domain=_domain(source),
                )
            )
        n_conversations = segments[-1].conversation + 1
    return Recording(
        expert_ids=np.concatenate(parts),
        segments=segments,
        model="Mixtral-8x7B" if "mixtral" in sources[0].stem else sources[0].stem,
        id_order="router_rank",
        warnings=warnings,
        extra={"segmentation": f"{PREFIX}-row prefix and repeats of turn 1 dropped"},
    )


def read_layers(source: Source) -> Ids:
    """Ids ``[T, L, K]`` of one file as recorded, prefix and repeats included."""
    content = source.json
    if not isinstance(content, dict) or not content:
        raise source.fail("must be an object of layers")
    keys = list(content)
    if sorted(keys, key=len) != sorted((str(i) for i in range(len(keys))), key=len):
        raise source.fail(
            f"keys must be the layers 0..{len(keys) - 1}, got {sorted(keys)[:3]!r:.80} …"
        )
    layers = [integers(content[str(i)], 2, f"{source.path}: layer {i}") for i in range(len(keys))]
    for index, layer in enumerate(layers):
        if layer.shape != layers[0].shape:
            raise source.fail(
                f"layer {index} must have {list(layers[0].shape)} entries like layer 0, "
                f"got {list(layer.shape)}"
            )
    return np.stack(layers, axis=1)


def request_starts(ids: Ids) -> Ids:
    """Rows whose expert sets equal those of row 0 in all layers."""
    sets = np.sort(ids, axis=2)
    return np.flatnonzero((sets == sets[0]).all(axis=(1, 2)))


def _segments(source: Source, ids: Ids) -> list[tuple[int, int, int, int]]:
    """(first row, last row, context before it, index of the request) of every segment."""
    sets = np.sort(ids, axis=2)
    starts = request_starts(ids)
    edges = [*starts.tolist(), len(ids)]
    if len(starts) % 2:
        raise source.fail(
            f"must hold two turns per conversation, "
            f"got {len(starts)} requests that start like row 0"
        )
    result = []
    for turn in range(0, len(starts), 2):
        first, second, end = edges[turn : turn + 3]
        length = second - first
        if length <= PREFIX or end - second <= length:
            raise source.fail(
                f"request at row {first} must be longer than the {PREFIX}-row template and be "
                f"repeated by the one at row {second}, got {length} and {end - second} rows"
            )
        one, two = sets[first:second], sets[second : second + length]
        same = float((one == two).all(axis=2).mean())
        if same < _SAME_TURN:
            raise source.fail(
                f"request at row {second} must repeat the one at row {first} (second turn), "
                f"got {same:.0%} of the expert sets alike"
            )
        result.append((first + PREFIX, second, PREFIX, turn))
        result.append((second + length, end, length, turn + 1))
    return result


def _dropped(source: Source, n_rows: int, found: list[tuple[int, int, int, int]]) -> str:
    """How many rows of the file are not imported, and why."""
    kept = sum(last - first for first, last, _, _ in found)
    prefix = PREFIX * (len(found) // 2)
    return (
        f"{source.path.name}: {n_rows - kept:,} of {n_rows:,} rows dropped: {prefix:,} are the "
        f"{PREFIX}-row template that the conversations share, {n_rows - kept - prefix:,} are "
        f"first turns that second turns prefill again; {kept:,} rows are left"
    )


def _domain(source: Source) -> str:
    parts = source.stem.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "experts" else source.stem
