"""vLLM ``routed_experts``: arrays, saved request objects, HTTP responses.

Three generations, told apart by what is there and never by the dtype:

1. request objects (0.21): ``prompt_routed_experts`` [prompt, routed layers, K] beside one
   ``routed_experts`` [generated, routed layers, K] per output, int16;
2. one array [prompt + generated - 1, all layers, K] per choice, uint8 or uint16: dense layers are
   zeros, the last sampled token was never forwarded;
3. the same in int32, where a request may have left out the first rows
   (``routed_experts_prompt_start``), and Dynamo's ``{data, shape, dtype, start}``.

Arrays come as ``.npy``, as base64 of it, or as nested lists. A position that was not recorded
(prefix cache) is a row of -1, or of 255 or 65535 where the type has no sign. Ids only, no weights;
E is not in the data. Written by
``vllm/model_executor/layers/fused_moe/routed_experts_capturer.py``.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym.importers import npy_file
from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source, integers, whole_number
from ndp_gym.trace_file import parse_json

_WORDS = (b'"routed_experts"', b'"prompt_routed_experts"')
_MAX_CONTEXT = 2**31
_NOT_RECORDED = (-1, 2**8 - 1, 2**16 - 1)  # -1 as int, uint8 and uint16

Ids = npt.NDArray[np.int64]


def detects(source: Source) -> bool:
    """Whether the content is a ``.npy`` or nested array, or JSON that mentions routed experts."""
    if source.data.startswith(npy_file.MAGIC) or _is_nested(source):
        return True
    return source.data.lstrip()[:1] in (b"{", b"[") and any(w in source.data for w in _WORDS)


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """Every array is a request; the choices of one response share the prompt, so a conversation."""
    if options.spans:
        raise sources[0].fail("an array is one request in this format, --spans is not accepted")
    parts: list[Ids] = []
    segments: list[Segment] = []
    model = "unknown"
    conversation = 0
    for source in sources:
        for name, response_model, choices in _responses(source):
            model = response_model or model
            for ids, n_prompt, offset in choices:
                kept, missing = recorded(ids, name)
                if parts and kept.shape[1:] != parts[0].shape[1:]:
                    raise ValueError(
                        f"{name} must have {parts[0].shape[1]} layers, top-{parts[0].shape[2]} "
                        f"like the first one, got {kept.shape[1]}, top-{kept.shape[2]}"
                    )
                parts.append(kept)
                segments.append(segment(len(ids), kept, missing, n_prompt, offset, conversation))
            conversation += 1
    ids, layer_ids = routed_layers(np.concatenate(parts), sources[0])
    warnings = []
    if len(layer_ids) < parts[0].shape[1]:
        dense = parts[0].shape[1] - len(layer_ids)
        warnings.append(f"{dense} layers of zeros are taken as dense and dropped")
    return Recording(
        expert_ids=ids,
        segments=segments,
        model=model,
        id_order="unknown",
        layer_ids=layer_ids,
        warnings=warnings,
    )


def segment(
    n_rows: int, kept: Ids, missing: int, n_prompt: int | None, offset: int, conversation: int
) -> Segment:
    """The request of the ``kept`` rows.

    Args:
        n_rows: Rows of the array, those that were not recorded too.
        kept: What `recorded` left of it.
        missing: Rows that were not recorded before the first one kept.
        n_prompt: Prompt rows among ``n_rows``, where known.
        offset: Tokens before the array.
        conversation: Its conversation.
    """
    return Segment(
        n_rows=len(kept),
        n_prompt=None if n_prompt is None else min(max(0, n_prompt - missing), len(kept)),
        context_offset=offset + missing,
        conversation=conversation,
        n_missing=offset + n_rows - len(kept),
    )


def _is_nested(source: Source) -> bool:
    return b"".join(source.data[:64].split()).startswith(b"[[[")


Choice = tuple[Ids, int | None, int]  # ids, prompt rows if known, tokens before the first row


def _responses(source: Source) -> list[tuple[str, str | None, list[Choice]]]:
    """(name, model, choices) of every response in the file."""
    if source.data.startswith(npy_file.MAGIC):
        return [(str(source.path), None, [(npy(source.data, str(source.path)), None, 0)])]
    if _is_nested(source):
        return [(str(source.path), None, [(integers(source.json, 3, str(source.path)), None, 0)])]
    named = documents(source)
    result = []
    for name, document in named:
        model = document.get("model")
        choices = _choices(document, name)
        result.append((name, model if isinstance(model, str) else None, choices))
    return result


def documents(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of every response: one object, an array of them, or one per line."""
    try:
        content = source.json
        documents = content if isinstance(content, list) else [content]
    except ValueError:
        if len(source.lines) < 2:
            raise
        documents = [
            parse_json(line, f"{source.path}: line {i}") for i, line in enumerate(source.lines, 1)
        ]
    named = [(f"{source.path}: response {i}", document) for i, document in enumerate(documents)]
    for name, document in named:
        if not isinstance(document, dict):
            raise ValueError(f"{name} must be a JSON object, got {type(document).__name__}")
    if not named:
        raise source.fail("holds no response")
    return named


def _choices(document: dict[str, Any], name: str) -> list[Choice]:
    choices = document.get("choices", document.get("outputs", [document]))
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"{name}: choices must be a non-empty list, got {choices!r:.80}")
    n_prompt, n_forwarded = _usage(document, len(choices), name)
    start = document.get("routed_experts_prompt_start", 0)
    start = whole_number(start, 0, _MAX_CONTEXT, f"{name}: routed_experts_prompt_start")
    shared = document.get("prompt_routed_experts")
    prompt = None if shared is None else _array(shared, f"{name}: prompt_routed_experts")[0]
    result: list[Choice] = []
    for index, choice in enumerate(choices):
        where = f"{name}: choices[{index}].routed_experts"
        if not isinstance(choice, dict) or choice.get("routed_experts") is None:
            raise ValueError(f"{where} is missing")
        ids, own_start = _array(choice["routed_experts"], where)
        if prompt is not None:
            if prompt.shape[1:] != ids.shape[1:]:
                raise ValueError(f"{where} must have the layers and K of prompt_routed_experts")
            result.append((np.concatenate([prompt, ids]), len(prompt), own_start or start))
            continue
        first = own_start or start
        if not first and n_forwarded is not None:  # rows left out, and only the request says so
            first = max(0, n_forwarded - len(ids))
        result.append((ids, None if n_prompt is None else max(0, n_prompt - first), first))
    return result


def _usage(document: dict[str, Any], n_choices: int, name: str) -> tuple[int | None, int | None]:
    """Prompt tokens, and tokens that were forwarded (all but the last), where the usage says so."""
    usage = document.get("usage")
    found = []
    for key in ("prompt_tokens", "completion_tokens"):
        value = usage.get(key) if isinstance(usage, dict) else None
        if value is not None:
            value = whole_number(value, 0, _MAX_CONTEXT, f"{name}: usage.{key}")
        found.append(value)
    n_prompt, n_generated = found
    if n_prompt is None or n_generated is None or n_choices > 1:  # of several, it is the sum
        return n_prompt, None
    return n_prompt, n_prompt + n_generated - 1


def _array(value: object, name: str) -> tuple[Ids, int]:
    """Ids ``[tokens, layers, K]`` of base64 ``.npy``, nested lists or a data/shape/dtype object."""
    if isinstance(value, str):
        return npy(decoded(value, name), name), 0
    if not isinstance(value, dict):
        return integers(value, 3, name), 0
    data, shape, dtype = value.get("data"), value.get("shape"), value.get("dtype")
    if not isinstance(data, str) or dtype not in ("uint8", "int16", "uint16", "int32", "int64"):
        raise ValueError(
            f"{name} must hold base64 data and an integer dtype, got dtype {dtype!r:.40}"
        )
    start = whole_number(value.get("start", 0), 0, _MAX_CONTEXT, f"{name}.start")
    sizes = tuple(integers(shape, 1, f"{name}.shape").tolist())
    blob = npy_file.Layout(np.dtype(str(dtype)), sizes, False, decoded(data, name))
    npy_file.check_size(blob, name)
    return _ids(blob, name), start


def decoded(text: str, name: str) -> bytes:
    """The bytes of base64 text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} must be base64: {error}") from None


def npy(data: bytes, name: str) -> Ids:
    """The integer array ``[tokens, layers, K]`` in a ``.npy`` file's bytes.

    Raises:
        ValueError: No such array, or one whose size is not that of the data.
    """
    return _ids(npy_file.layout(data, name), name)


def _ids(found: npy_file.Layout, name: str) -> Ids:
    dtype, shape = found.dtype, found.shape
    if dtype.kind not in "iu" or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"{name} must be integers [tokens, layers, K], got {dtype} {list(shape)!s:.60}"
        )
    ids = found.array()
    if int(ids.max()) > _MAX_CONTEXT:
        raise ValueError(f"{name} must hold ids below 2**31, got {ids.max()}")
    return ids.astype(np.int64)


def recorded(ids: Ids, name: str) -> tuple[Ids, int]:
    """The rows that were recorded, and how many are missing before them.

    A row is missing where every layer that is not dense (zeros) repeats one mark K times.
    """
    missing = np.zeros(len(ids), dtype=np.bool_)
    dense = (ids == 0).all(axis=2)
    for mark in _NOT_RECORDED:
        marked = (ids == mark).all(axis=2)
        missing |= (marked | dense).all(axis=1) & marked.any(axis=1)
    if missing.all():
        raise ValueError(f"{name} holds no recorded row (all -1)")
    first = int(np.argmin(missing))
    last = len(ids) - int(np.argmin(missing[::-1]))
    if missing[first:last].any():
        row = first + int(np.argmax(missing[first:last]))
        raise ValueError(
            f"{name} must have missing rows (-1) at its ends only, got one at row {row}"
        )
    if (ids[first:last] < 0).any():
        row = first + int(np.argmax((ids[first:last] < 0).any(axis=(1, 2))))
        raise ValueError(
            f"{name} must hold ids >= 0 or rows of -1, got {ids[row].min()} in row {row}"
        )
    return ids[first:last], first


def routed_layers(ids: Ids, source: Source) -> tuple[Ids, tuple[int, ...]]:
    """Ids without dense layers (all zeros), and the numbers of the layers kept."""
    zeros = (ids == 0).all(axis=(0, 2))
    if ids.shape[2] == 1:  # top-1 routing may send everything to expert 0: only leading layers
        zeros &= np.cumprod(zeros).astype(np.bool_)
    if zeros.all():
        raise source.fail("every layer holds zeros only: no routed layer")
    return ids[:, ~zeros], tuple(np.flatnonzero(~zeros).tolist())
