"""What agents of several models are trained and tested on.

A recording with splits of its own is taken as it is. A shorter one is halved: a long synthetic
recording is drawn from the statistics of one half, and the other half is kept for evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndp_gym.importers import import_trace
from ndp_gym.synthesize import pattern, request_table, write_trace
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_counts import decode_counts
from train.findings.recordings import SOURCES
from train.synthetic.halves import halves

TITLES = tuple(title for title in SOURCES if "Gemma" not in title)
"""Recordings of three requests or more."""

DEFAULT = tuple(title for title in TITLES if "Granite" not in title)
"""Those of them that the page is about; the others cost time and are much like one of these."""

SEED = 2  # of what is drawn


class Recording(NamedTuple):
    """A model's routing.

    Attributes:
        title: of the recording behind it.
        path: file with train, val and test splits.
        fitted, held_out: halves of the recording where ``path`` is synthetic, else ``None``.
        shape: layers, experts per layer, experts per token.
    """

    title: str
    path: Path
    fitted: Path | None
    held_out: Path | None
    shape: tuple[int, int, int]


def source_files(title: str, folder: Path) -> list[Path]:
    """The files of a recording below ``folder``.

    Raises:
        ValueError: the title is unknown, or there are none.
    """
    if title not in SOURCES:
        raise ValueError(f"a model must be one of {', '.join(TITLES)}, got {title!r}")
    files = sorted(folder.glob(SOURCES[title]))
    if not files:
        raise ValueError(f"{title} needs {SOURCES[title]} below {folder}, which has none")
    return files


def make(title: str, folder: Path, into: Path, n_requests: int, n_tokens: int) -> Recording:
    """Import a recording into ``into``, with what is drawn from it (see `prepared`)."""
    return prepared(
        title, import_trace(source_files(title, folder)).trace, into, n_requests, n_tokens
    )


def prepared(
    title: str, trace: RoutingTrace, into: Path, n_requests: int, n_tokens: int
) -> Recording:
    """Files of one recording; where drawn, ``n_requests`` of ``n_tokens`` decode tokens each."""
    shape = trace.n_layers, trace.n_experts, trace.top_k
    name = title.lower()
    if not trace.requests.evaluation_only:
        path = into / f"{name}.safetensors"
        trace.save(path)
        return Recording(title, path, None, None, shape)
    paths = [into / f"{name}_{part}.safetensors" for part in ("synthetic", "fitted", "held_out")]
    for half, path in zip(next(halves(trace)), paths[1:], strict=True):
        half.save(path)
    like = pattern(str(paths[1]))
    n_rows = -(-n_tokens * 4 // 3)  # a quarter of a drawn request is its prompt
    requests = request_table(n_requests, n_rows, like.domains, seed=SEED)
    write_trace(paths[0], like, requests, seed=SEED)
    return Recording(title, *paths, shape)


def profile_of(path: Path) -> NDArray[np.float64]:
    """[L, E] tokens per decode token of a whole recording: what the held-out half is told."""
    trace = RoutingTrace.open(path)
    everything = np.arange(len(trace.requests))
    return decode_counts(trace, everything) / float(trace.requests.n_decode.sum())
