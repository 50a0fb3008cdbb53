"""Synthetic recordings of any length and shape, like a recording or a model preset.

Nothing recorded is copied: a profile of two amplitudes a layer and a dozen shares is fitted to the
source's statistics and requests are drawn from it (docs/synthetic.md says which it holds). Labelled
synthetic in the metadata.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndp_gym import trace_file
from ndp_gym.synthesize.fit import fit_profile
from ndp_gym.synthesize.generate import Generator, Piece, Shape
from ndp_gym.synthesize.profile import RoutingProfile, calibrated, gates_for
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_content import id_dtype, scan
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import COLUMNS, Requests, assign_splits

__all__ = [
    "Generator",
    "Pattern",
    "RoutingProfile",
    "Shape",
    "fit_profile",
    "pattern",
    "request_table",
    "write_trace",
]

PHASES = "drawn: the first quarter of a request"
_PROMPT_SHARE = 4  # one row in this many is prefill
_LENGTH_SPREAD = 0.5  # of the log of a request's length
_MAX_ROWS = 2**40
_DOMAINS = tuple(f"domain {number}" for number in range(4))

Progress = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What to imitate: a profile and a shape, and where they come from."""

    profile: RoutingProfile
    shape: Shape
    model: str
    preset: str | None
    source: str
    domains: tuple[str, ...]


def pattern(
    like: str | None,
    *,
    n_layers: int | None = None,
    n_experts: int | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> Pattern:
    """The pattern of a trace file (fitted now) or a model preset (fitted before, or its nearest).

    Args:
        like: Path of a trace, or name of a model preset; None for a shape that nobody recorded,
            drawn like the calibrated model whose E and K are nearest.
        n_layers: Other number of routed layers.
        n_experts: Other number of experts per layer, up to 1000.
        top_k: Other number of experts per token.
        seed: Of the fit.

    Raises:
        ValueError: Neither a file nor a preset, or an impossible shape.
    """
    known = _known(like, n_experts, top_k, seed)
    shape = Shape(
        n_layers=n_layers or (known.shape.n_layers if known else 0),
        n_experts=n_experts or (known.shape.n_experts if known else 0),
        top_k=top_k or (known.shape.top_k if known else 0),
    )
    if known is None:
        name, profile = calibrated(None, shape.n_experts, shape.top_k)
        known = Pattern(
            profile=profile,
            shape=shape,
            model="unnamed model",
            preset=None,
            source=f"calibrated on {name}",
            domains=_DOMAINS,
        )
    model, preset = known.model, known.preset
    if known.shape != shape or preset is None:
        preset = None
        model += f" as {shape.n_layers} layers, {shape.n_experts} experts, top-{shape.top_k}"
    return replace(
        known,
        shape=shape,
        profile=replace(known.profile, gates=gates_for(known.profile.gates, shape.top_k)),
        model=f"{model} (synthetic)",
        preset=preset,
        source=f"synthetic, {known.source}",
    )


def _known(like: str | None, n_experts: int | None, top_k: int | None, seed: int) -> Pattern | None:
    """The pattern of the source itself: a file or a preset; None without one."""
    from ndp_gym import presets

    if like is None:
        return None
    if Path(like).is_file():
        trace = RoutingTrace.open(like)
        return Pattern(
            profile=fit_profile(trace, seed=seed),
            shape=Shape(n_layers=trace.n_layers, n_experts=trace.n_experts, top_k=trace.top_k),
            model=trace.metadata.model,
            preset=trace.metadata.preset,
            source=f"fitted to {Path(like).name} (sha256 {trace.sha256[:16]})",
            domains=trace.requests.domains,
        )
    if like not in presets.names("models") and (os.sep in like or "." in Path(like).suffix[:1]):
        raise ValueError(f"{like}: no such file, and no model preset of that name")
    spec = presets.model(like)
    name, profile = calibrated(like, n_experts or spec.n_experts, top_k or spec.top_k)
    gates = gates_for(spec.gate_profile, spec.top_k) or gates_for(profile.gates, spec.top_k)
    return Pattern(
        profile=replace(profile, gates=gates),
        shape=Shape(n_layers=spec.n_layers, n_experts=spec.n_experts, top_k=spec.top_k),
        model=spec.name,
        preset=spec.name,
        source=f"calibrated on {name}",
        domains=_DOMAINS,
    )


def request_table(
    n_requests: int, mean_rows: int, domains: tuple[str, ...], *, run: int = 1, seed: int = 0
) -> Requests:
    """Requests of one conversation each, ``n_requests * mean_rows`` rows together.

    Args:
        n_requests: Requests.
        mean_rows: Rows of a request on average; a quarter of each is prefill.
        domains: Names, in turn.
        run: Requests in a row that come from one domain; then it shifts at once.
        seed: Of the lengths and the splits.
    """
    if not 1 <= n_requests <= 2**24:
        raise ValueError(f"requests must be in 1..{2**24}, got {n_requests}")
    if mean_rows < 4 or n_requests * mean_rows > _MAX_ROWS:
        raise ValueError(f"tokens must be at least 4, and 2**40 in all, got {mean_rows}")
    if run < 1:
        raise ValueError(f"domain run must be at least 1, got {run}")
    rng = np.random.default_rng([seed, n_requests])
    weights = np.exp(_LENGTH_SPREAD * rng.standard_normal(n_requests))
    edges = np.cumsum(weights / weights.sum() * (n_requests * (mean_rows - 4)))
    length = np.diff(np.rint(edges).astype(np.int64), prepend=0) + 4
    number = np.arange(n_requests, dtype=np.int64)
    table = np.zeros((n_requests, len(COLUMNS)), dtype=np.int64)
    table[:, 0] = np.cumsum(length) - length
    table[:, 1] = length // _PROMPT_SHARE
    table[:, 2] = length
    table[:, 4] = number
    table[:, 5] = number // run % len(domains)
    table[:, 6] = assign_splits(number, table[:, 5], seed=seed)
    return Requests.from_table(table, domains)


def write_trace(
    path: Path,
    like: Pattern,
    requests: Requests,
    *,
    seed: int = 0,
    loops: float = 0.0,
    progress: Progress = lambda rows: None,
) -> RoutingTrace:
    """Draw the rows of ``requests`` and write them as they are drawn.

    Memory does not grow with the number of rows. The same arguments give the same bytes.

    Args:
        path: File to write.
        like: What to imitate.
        requests: The table (see ``request_table``).
        seed: Of every random number.
        loops: Share of the requests that end in a loop.
        progress: Called with the rows of every piece.
    """
    generator = Generator(like.profile, like.shape, seed=seed, loops=loops)
    metadata = TraceMetadata(
        model=like.model,
        n_experts=like.shape.n_experts,
        top_k=like.shape.top_k,
        preset=like.preset,
        source=like.source,
        licence="generated, holds no recorded data",
        recorder="ndp-gym trace synthesize",
        id_order="router_rank",
        phases=PHASES,
        extra={
            "synthetic": True,
            "seed": seed,
            "loops": loops,
            "profile": like.profile.to_json(),
            "split_seed": seed,
        },
    )
    n_rows = int(requests.length.sum())
    requests.check(n_rows, str(path))
    shape = (n_rows, like.shape.n_layers, like.shape.top_k)
    table = requests.table()
    layout: dict[str, trace_file.Layout] = {"requests": (table.dtype, table.shape)}
    if like.profile.gates is not None:
        layout["gate_weights"] = (np.dtype(np.float16), shape)
    layout["expert_ids"] = (id_dtype(like.shape.n_experts), shape)
    with trace_file.Writer(path, layout, metadata.to_json(requests.domains)) as writer:
        writer.append("requests", table)
        for piece in generator.pieces(requests):
            _append(writer, piece, like.shape.n_experts, str(path))
            progress(len(piece.expert_ids))
    return RoutingTrace.open(path)


def _append(writer: trace_file.Writer, piece: Piece, n_experts: int, name: str) -> None:
    ids: npt.NDArray[Any] = piece.expert_ids
    scan(name, ids, piece.gate_weights, n_experts, piece.first_row)
    writer.append("expert_ids", ids)
    if piece.gate_weights is not None:
        writer.append("gate_weights", piece.gate_weights)
