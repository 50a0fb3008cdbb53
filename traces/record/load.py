"""Open a Hugging Face model and its tokenizer; every failure is one sentence."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from traces.record.huggingface import HuggingFaceModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model to open, and how.

    Attributes:
        model: Folder of a saved model, or its id on the hub.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; ``auto`` as stored.
        device: ``cpu``, ``cuda`` ..., or ``auto``: spread over what there is (needs accelerate).
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"recording needs transformers, which is an extra: pip install -e '.[record]' ({error})"
        ) from None
    library: Any = transformers
    library.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        library.logging.disable_progress_bar()
    return library


def load_model(source: Source, *, ignore_stop: bool = False) -> HuggingFaceModel:
    """Open the model; weights in MXFP4 are expanded, since their fused kernel skips the router.

    Raises:
        ValueError: transformers or the model is missing, the architecture is unknown, or it has
            no mixture-of-experts layers.
    """
    transformers = import_transformers()
    options: dict[str, Any] = {"revision": source.revision}
    config = _attempt(
        source, lambda: transformers.AutoConfig.from_pretrained(source.model, **options)
    )
    if _is_mxfp4(config):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    if source.device == "auto":
        options["device_map"] = "auto"
    options["dtype"] = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = _attempt(source, lambda: load(source.model, **options))
    if source.device != "auto":
        model = _attempt(source, lambda: model.to(source.device))
    return HuggingFaceModel(model, stop_ids=() if ignore_stop else None)


def load_encoder(source: Source) -> Callable[[str | list[dict[str, str]]], Sequence[int]]:
    """What turns a text, or messages by the model's chat template, into token ids.

    Raises:
        ValueError: The model has no tokenizer.
    """
    load = import_transformers().AutoTokenizer.from_pretrained
    tokenizer = _attempt(source, lambda: load(source.model, revision=source.revision))

    def encode(content: str | list[dict[str, str]]) -> Sequence[int]:
        if isinstance(content, str):
            ids: Sequence[int] = tokenizer(content)["input_ids"]
            return ids
        text = _attempt(
            source,
            lambda: tokenizer.apply_chat_template(
                content, tokenize=False, add_generation_prompt=True
            ),
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def _is_mxfp4(config: Any) -> bool:
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method)) == "mxfp4"


def _attempt(source: Source, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; the library's errors become one sentence about the model."""
    try:
        return call()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        where = "" if Path(source.model).is_dir() else " (no folder of that name either)"
        raise ValueError(
            f"cannot open model {source.model}{where}: {said[:300] or type(error).__name__}"
        ) from None
