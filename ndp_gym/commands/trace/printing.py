"""Tables about a trace, and the checks of arguments that its commands share."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ndp_gym.commands import make_console
from ndp_gym.trace_metadata import N_MISSING

if TYPE_CHECKING:
    from rich.progress import Progress

    from ndp_gym.trace import RoutingTrace

Rows = Iterable[Sequence[str]]


def print_info(trace: "RoutingTrace", title: str) -> None:
    """Print metadata and splits of a trace."""
    facts, r = trace.metadata, trace.requests
    shape = f"{trace.n_layers} layers, {trace.n_experts} experts, top-{trace.top_k}"
    sizes = facts.expert_bytes
    splits = [
        f"{name} {int((r.split == code).sum())} ({len(set(r.conversation[r.split == code]))})"
        for code, name in enumerate(("train", "val", "test"))
    ]
    rows = [
        ("model", facts.model + (f" (preset {facts.preset})" if facts.preset else "")),
        ("shape", shape),
        ("rows", f"{trace.n_rows:,}: {r.n_prompt.sum():,} prefill, {r.n_decode.sum():,} decode"),
        ("requests", f"{len(r)} in {r.n_conversations} conversations"),
        ("splits", "requests (conversations): " + ", ".join(splits)),
        ("domains", ", ".join(r.domains)),
        ("prefill", facts.phases),
        ("not recorded", _not_recorded(trace)),
        ("order of ids", facts.id_order),
        ("gate weights", "none" if trace.gate_weights is None else "float16"),
        ("expert bytes", "unknown" if sizes is None else f"{min(sizes):,}..{max(sizes):,}"),
        ("source", facts.source),
        ("licence", facts.licence),
        ("recorder", facts.recorder),
    ]
    print_table(title, ("fact", "value"), rows)


def _not_recorded(trace: "RoutingTrace") -> str:
    """Tokens of the requests without routing in the source, and their share."""
    n_missing = trace.metadata.extra.get(N_MISSING, 0)
    if type(n_missing) is not int or n_missing < 1:
        return "none known"
    share = n_missing / (n_missing + trace.n_rows)
    return f"{n_missing:,} tokens ({share:.1%} of all): not replayed, context at most"


def print_table(title: str, columns: Sequence[str], rows: Rows) -> None:
    """Print a table; 180 columns wide where neither a terminal nor ``COLUMNS`` says the width."""
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def checked_out(out: Path, inputs: Sequence[Path], option: str = "--out") -> Path:
    """``out``, which ``option`` gave, if it can be written and is none of the inputs.

    Raises:
        ValueError: It is a folder, in no folder, or one of ``inputs``.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"{option} must be a file in a folder that exists, got {out}")
    if any(path.exists() and out.exists() and path.samefile(out) for path in inputs):
        raise ValueError(f"{option} must not be one of the files that are read, got {out}")
    return out


def progress_bar() -> "Progress":
    """A progress bar on stderr, shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
