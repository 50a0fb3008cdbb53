"""Importers of foreign routing recordings: one file per format, found by content.

``import_trace`` reads files or a folder and returns a checked trace in memory; nothing is written.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ndp_gym.importers import (
    bigmoe,
    eval_callback,
    gguf,
    grouped_nf4,
    hdmoe,
    megatron,
    nvmoe,
    routertrace,
    sglang,
    sglang_recorder,
    vllm,
)
from ndp_gym.importers.recording import ImportOptions, ImportResult, build_trace
from ndp_gym.importers.source import AS_PROFILE, Source, open_source

__all__ = ["FORMATS", "ImportOptions", "ImportResult", "import_trace"]

FORMATS: dict[str, ModuleType] = {
    "bigmoe": bigmoe,
    "grouped-nf4": grouped_nf4,
    "nvmoe": nvmoe,
    "hdmoe": hdmoe,
    "routertrace": routertrace,
    "megatron": megatron,
    "llama-csv": eval_callback,
    "sglang": sglang,
    "sglang-recorder": sglang_recorder,
    "vllm": vllm,
}
_SUFFIXES = (".json", ".jsonl", ".csv", ".npy", ".pt", ".gguf", ".gz")


def import_trace(
    paths: Sequence[str | os.PathLike[str]],
    format_name: str | None = None,
    options: ImportOptions | None = None,
) -> ImportResult:
    """The recording in the files (of a folder: all its recordings, by name) as one trace.

    Args:
        paths: Files of one format and model, or folders of them; ``.gz`` is unpacked.
        format_name: One of ``FORMATS``; default: recognised by content.
        options: What the files do not say.

    Raises:
        ValueError: Unknown, damaged or contradictory content; one sentence naming the file.
        OSError: A file cannot be read.
    """
    options = options or ImportOptions()
    if format_name is not None and format_name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    sources = [open_source(path) for path in _files(paths)]
    found = format_name or _detected(sources)
    recording = FORMATS[found].read(sources, options)
    return build_trace(recording, sources, options, found)


def _files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(
            file
            for file in path.iterdir()
            if file.is_file() and file.suffix in _SUFFIXES and file.name not in routertrace.SIDECARS
        )
        if not inside:
            deeper = any(entry.is_dir() for entry in path.iterdir())
            hint = "; its subfolders are not searched: name one of them" if deeper else ""
            raise ValueError(f"{path}: holds no file ending in {', '.join(_SUFFIXES)}{hint}")
        files += inside
    if not files:
        raise ValueError("no file to import was given")
    if len({file.resolve() for file in files}) != len(files):
        raise ValueError(f"the same file is given twice: {', '.join(map(str, files))}"[:300])
    return files


def _detected(sources: Sequence[Source]) -> str:
    found = {source.path: _format_of(source) for source in sources}
    names = set(found.values())
    if len(names) > 1:
        listed = ", ".join(f"{path.name} is {name}" for path, name in found.items())
        raise ValueError(f"files must be of one format, got {listed}"[:300])
    return names.pop()


def _format_of(source: Source) -> str:
    if source.data.startswith(gguf.MAGIC):
        is_matrix = b"imatrix." in source.data[:65536]
        raise source.fail(
            f"{'an importance matrix' if is_matrix else 'a GGUF file'} holds sums over a text, not "
            f"the experts of each token, and cannot be replayed: record token,layer,expert rows "
            f"with an eval callback{f', or {AS_PROFILE}' if is_matrix else ''}"
        )
    if source.data.lstrip()[:1] == b"{" and b'"logical_count"' in source.data[:4096]:
        raise source.fail(
            f"holds counts per expert, not the experts of each token, and cannot be replayed: "
            f"record again per token, or {AS_PROFILE}"
        )
    for name, module in FORMATS.items():
        if module.detects(source):
            return name
    raise source.fail(
        f"format not recognised: must be one of {', '.join(FORMATS)} (--format), "
        f"starts with {source.data[:24]!r}"
    )
