"""The recordings that findings are about: public files, imported into a folder, and our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ndp_gym.importers import import_trace
from ndp_gym.inputs import bundled_trace_path
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS
from ndp_gym.validation.recordings import Recordings

_NVMOE = "BrianBoitano__nvmoe/traces"
_NF4 = "pjordanandrsn__grouped-nf4-gemm/bench/cold-engine/routing-trace"
_BIGMOE = "Helldez__BigMoeOnEdge/docs/bench-data/2026-07-15-route-trace"
SOURCES = {
    "Mixtral-8x7B": "angerybob__HD-MoE/expert_trace/mixtral/*.json*",
    "DeepSeek-V2-Lite": f"{_NVMOE}/dsv2lite-all.tokens.jsonl*",
    "gpt-oss-120b": f"{_NVMOE}/gptoss-all.tokens.jsonl*",
    "OLMoE-1B-7B": f"{_NVMOE}/olmoe-all.tokens.jsonl*",
    "Qwen1.5-MoE-A2.7B": f"{_NF4}/qwen_*.jsonl*",
    "Granite-3.0-3B-A800M": f"{_NF4}/granite_*.jsonl*",
    "Gemma-4-26B-A4B": f"{_BIGMOE}/gemma.route.csv*",
}
BUNDLED = "the bundled recording"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording to evaluate.

    Attributes:
        title: as the page names it.
        path: of the trace file.
        notes: what a reader must know about it.
        n_requests: test requests with decode rows, the most that can be in flight at once.
        n_conversations: of those.
        n_tokens: decode tokens of those.
    """

    title: str
    path: Path
    notes: tuple[str, ...]
    n_requests: int
    n_conversations: int
    n_tokens: int

    def batch_sizes(self, asked: tuple[int, ...]) -> list[int]:
        """The batch sizes asked for, none above the number of requests."""
        return sorted({min(batch, self.n_requests) for batch in asked})


def missing(folder: Path) -> list[str]:
    """Titles whose files are not below ``folder``, with what to put where."""
    return [
        f"{title} (needs {pattern})"
        for title, pattern in SOURCES.items()
        if not any(folder.glob(pattern))
    ]


def recordings(folder: Path, into: Path) -> Iterator[Recording]:
    """Every recording that is there, imported into ``into``; the bundled one last."""
    for title, pattern in SOURCES.items():
        files = sorted(folder.glob(pattern))
        if files:
            found = import_trace(files)
            path = into / f"{title.lower()}.safetensors"
            yield _described(title, found.trace.save(path), path, _loops(found.warnings))
    path = bundled_trace_path()
    yield _described(BUNDLED, RoutingTrace.open(path), path, ())


def default_folder() -> Path:
    """Where third-party recordings are looked for."""
    return Recordings().folder


def _loops(warnings: tuple[str, ...]) -> tuple[str, ...]:
    looped = sum("repeats itself" in text for text in warnings)
    return (f"{looped} looping requests were cut where they begin to loop",) if looped else ()


def _described(title: str, trace: RoutingTrace, path: Path, notes: tuple[str, ...]) -> Recording:
    requests, facts = trace.requests, trace.metadata
    decoding = (requests.split == SPLITS.index("test")) & (requests.n_decode > 0)
    return Recording(
        title=title,
        path=path,
        notes=(f"prefill: {facts.phases}", *notes),
        n_requests=int(decoding.sum()),
        n_conversations=len(np.unique(requests.conversation[decoding])),
        n_tokens=int(requests.n_decode[decoding].sum()),
    )
