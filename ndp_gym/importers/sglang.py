"""SGLang responses with ``meta_info["routed_experts"]``.

Base64 of raw int32 ids of all hidden layers, dense ones zero, without a shape: K must be said, and
the number of layers follows from the tokens of the response. Ids only, no weights. Written by
``sglang/srt/state_capturer/routed_experts.py`` (0.5.23).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ndp_gym.importers.recording import ImportOptions, Recording, Segment
from ndp_gym.importers.source import Source, whole_number
from ndp_gym.importers.vllm import Ids, decoded, documents, recorded, routed_layers, segment

_MAX_TOKENS = 2**31


def detects(source: Source) -> bool:
    """Whether the content is JSON that mentions both keys."""
    if source.data.lstrip()[:1] not in (b"{", b"["):
        return False
    return b'"meta_info"' in source.data and b'"routed_experts"' in source.data


def read(sources: Sequence[Source], options: ImportOptions) -> Recording:
    """Every response is a request and a conversation of its own."""
    if options.spans:
        raise sources[0].fail("a response is one request in this format, --spans is not accepted")
    top_k, n_layers = _sizes(sources[0], options)
    parts: list[Ids] = []
    segments: list[Segment] = []
    for source in sources:
        for name, document in documents(source):
            ids, n_prompt, offset = _response(document, name, top_k, n_layers)
            kept, missing = recorded(ids, name)
            n_layers = ids.shape[1]
            parts.append(kept)
            left = max(0, n_prompt - offset)
            segments.append(segment(len(ids), kept, missing, left, offset, len(segments)))
    every = np.concatenate(parts)
    ids, layer_ids = routed_layers(every, sources[0])
    dense = every.shape[1] - len(layer_ids)
    return Recording(
        expert_ids=ids,
        segments=segments,
        model="unknown",
        id_order="unknown",
        layer_ids=layer_ids,
        warnings=[f"{dense} layers of zeros are taken as dense and dropped"] if dense else [],
    )


def _sizes(source: Source, options: ImportOptions) -> tuple[int, int | None]:
    """K, and all hidden layers where the model is a preset."""
    from ndp_gym import presets

    if options.model in presets.names("models"):
        spec = presets.model(str(options.model))
        return options.top_k or spec.top_k, spec.n_all_layers
    if options.top_k is None:
        raise source.fail(
            "routed_experts are raw ids without a shape in this format: say --top-k, "
            "or --model with the name of a model preset"
        )
    return options.top_k, None


def _response(
    document: dict[str, Any], name: str, top_k: int, n_layers: int | None
) -> tuple[Ids, int, int]:
    """Ids ``[tokens, all layers, K]``, prompt tokens, and tokens before the first row."""
    meta = document.get("meta_info")
    if not isinstance(meta, dict) or not isinstance(meta.get("routed_experts"), str):
        raise ValueError(f"{name}: meta_info.routed_experts must be base64 text")
    tokens = [
        whole_number(meta.get(key), 0, _MAX_TOKENS, f"{name}: meta_info.{key}")
        for key in ("prompt_tokens", "completion_tokens")
    ]
    forwarded = sum(tokens) - 1  # the last sampled token is never forwarded
    data = decoded(meta["routed_experts"], f"{name}: meta_info.routed_experts")
    per_row = forwarded if n_layers is None else n_layers
    if per_row < 1 or not data or len(data) % (4 * top_k * per_row):
        raise ValueError(
            f"{name}: meta_info.routed_experts must be int32 [tokens, layers, {top_k}] for "
            f"{'any' if n_layers is None else n_layers} layers and {forwarded} forwarded tokens, "
            f"got {len(data)} bytes"
        )
    flat = np.frombuffer(data, dtype="<i4").astype(np.int64)
    ids = flat.reshape((forwarded, -1, top_k) if n_layers is None else (-1, n_layers, top_k))
    if len(ids) > forwarded:
        raise ValueError(
            f"{name}: meta_info.routed_experts must have at most {forwarded} rows, got {len(ids)}"
        )
    return ids, tokens[0], forwarded - len(ids)
