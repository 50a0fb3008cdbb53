"""How results are shown: a terminal table, JSON, CSV, LaTeX and one picture.

Reads finished rows only; rich and matplotlib are imported when they are first used.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ndp_gym.report_uncertainty import print_study
from ndp_gym.results import (
    MODELED,
    PLACEMENT_UNNECESSARY,
    Condition,
    EvaluationResult,
    Row,
    all_hbm_winner,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "check_writable",
    "print_tables",
    "write_csv",
    "write_json",
    "write_latex",
    "write_png",
    "write_whole",
]

NOTHING = "-"
ENERGY = "J/tok"


class Column(NamedTuple):
    """One table column: heads for terminal and LaTeX, the text of a row, who gives way first."""

    head: str
    latex: str
    text: Callable[[Row], str]
    rank: int  # the highest are left out first where the terminal is narrow


def _number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, without exponents up to a million."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def _interval(value: tuple[float, float] | None) -> str:
    return NOTHING if value is None else f"{_number(value[0])}..{_number(value[1])}"


def _scaled(value: float | None, scale: float, digits: int = 3) -> str:
    return _number(None if value is None else value * scale, digits)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f}"


def _busy(row: Row) -> str:
    if row["gpu_busy"] is None:
        return NOTHING
    return "/".join(_percent(row[k]) for k in ("gpu_busy", "far_busy", "link_busy"))


def _fixed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


COLUMNS = (
    Column("tok/s", r"tok/s", lambda r: _number(r["tokens_per_s"]), 0),
    Column("95 %", r"95\,\%", lambda r: _interval(r["tokens_per_s_ci95"]), 7),
    Column("x far4", r"$\times$ far4", lambda r: _fixed(r["speedup_vs_all_far4"], 2), 3),
    Column("x HBM", r"$\times$ HBM", lambda r: _fixed(r["speedup_vs_all_hbm"], 2), 6),
    Column("ΔNLL", r"$\Delta$NLL", lambda r: _fixed(r["delta_nll_nats"], 3), 1),
    Column("bits", r"bits", lambda r: _fixed(r["mean_bits"], 1), 5),
    Column("hit %", r"hit \%", lambda r: _percent(r["hit_rate"]), 4),
    Column("reward", r"reward", lambda r: _fixed(r["reward"], 3), 2),
    Column("regret", r"regret", lambda r: _fixed(r["regret"], 3), 2),
    Column("p50 ms", r"p50 ms", lambda r: _scaled(r["decode_step_p50_s"], 1e3), 8),
    Column("p99 ms", r"p99 ms", lambda r: _scaled(r["decode_step_p99_s"], 1e3), 9),
    Column("TTFT s", r"TTFT s", lambda r: _number(r["ttft_s"]), 10),
    Column(ENERGY, ENERGY, lambda r: _number(r["joules_per_token"]), 11),
    Column("busy % G/F/L", r"busy \% G/F/L", _busy, 12),
    Column("decide ms", r"decide ms", lambda r: _number(r["decision_ms"], 2), 13),
)


def _columns(rows: Sequence[Row]) -> list[Column]:
    """All columns, regret only where it was asked for."""
    has_regret = any(row["regret"] is not None for row in rows)
    return [c for c in COLUMNS if has_regret or c.head != "regret"]


def _fitting(rows: Sequence[Row], width: int) -> list[Column]:
    """The columns that can be shown whole in ``width`` characters, the lowest ranks first."""
    left = width - max(len(_short(r)) for r in rows) - max(len(_mark(r)) for r in rows) - 7
    columns, kept = _columns(rows), []
    for column in sorted(columns, key=lambda c: c.rank):
        left -= 3 + max(len(column.head), *(len(column.text(row)) for row in rows))
        if left < 0:
            break
        kept.append(column)
    return [column for column in columns if column in kept]


def _short(row: Row) -> str:
    """A policy's name without the path of its file or module."""
    target, _, options = row["policy"].partition(":")
    return options if target.endswith(".py") or "." in target else row["policy"]


def _caption(columns: Sequence[Column]) -> str:
    """What every reader must know; no total of the energy model was ever checked."""
    has_energy = any(column.head == ENERGY for column in columns)
    return f"{MODELED}; {ENERGY} unvalidated" if has_energy else MODELED


def print_tables(result: EvaluationResult, *, width: int | None = None) -> None:
    """Print one table per condition to standard output.

    Args:
        result: what `evaluate` returned.
        width: terminal columns; ``None`` asks the terminal, and takes 120 where there is none.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if width is not None or not console.is_terminal:
        console = Console(highlight=False, width=width or int(os.environ.get("COLUMNS", 120)))
    for condition, rows in result.by_condition().items():
        console.print()
        console.print(str(condition), style="bold", markup=False)
        console.print(_table(rows, console.width))
        for line in [*_footnotes(rows), *_quality_lines(result, rows)]:
            console.print(line, markup=False)
        for found in result.uncertainty:
            if Condition.of(found) == condition:
                print_study(found, console)


def _table(rows: Sequence[Row], width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = _fitting(rows, width)
    caption = _caption(columns)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=caption)
    table.caption_justify = "left"
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    best = max((r["reward"] for r in rows if r["reward"] is not None), default=None)
    for row in rows:
        style = "bold" if best is not None and row["reward"] == best else None
        if row["tokens_per_s"] is None:
            style = "dim"
        cells: list[RenderableType] = [Text(_short(row)), *(Text(c.text(row)) for c in columns)]
        table.add_row(*cells, Text(_mark(row)), style=style)
    return table


def _mark(row: Row) -> str:
    mark = {"in_range": "", "extrapolated": "!"}.get(row["validity"], row["validity"])
    return f"{mark}~" if row["order_flips_with"] else mark


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """Reasons and notes, rows with the same text in one line."""
    by_text: dict[str, list[str]] = {}
    for row in rows:
        prefix = "" if row["validity"] == "in_range" else f"{row['validity']}: "
        notes = [note for note in row["notes"] if note != PLACEMENT_UNNECESSARY]
        for text in [*(f"{prefix}{r}" for r in row["validity_reasons"]), *notes]:
            by_text.setdefault(text, []).append(row["policy"])
    lines, ran = [], {row["policy"] for row in rows if row["tokens_per_s"] is not None}
    for text, policies in by_text.items():
        who = "all rows" if ran <= set(policies) else ", ".join(policies)
        lines.append(f"  {who}: {text}")
    bounds = sorted({f"{r['reward_bound']:.3f}" for r in rows if r["reward_bound"] is not None})
    if bounds:
        lines.append(
            f"  regret: to proved upper bounds of the reward by service, {', '.join(bounds)}"
        )
    winner = all_hbm_winner(rows)
    if winner is not None:
        lines.append(f"  {PLACEMENT_UNNECESSARY}: {winner['policy']} has the highest reward")
    return lines


def _quality_lines(result: EvaluationResult, rows: Sequence[Row]) -> list[str]:
    """The best throughput within every quality budget of one condition."""
    lines = []
    for entry in result.at_quality:
        if entry["policy"] == "best" and Condition.of(entry) == Condition.of(rows[0]):
            found = entry["tokens_per_s"]
            text = "no row" if found is None else f"{_number(found)} tok/s, {entry['achieved_by']}"
            lines.append(f"  best at ΔNLL <= {entry['delta_nll_budget']:g} nats: {text}")
    return lines


def write_json(result: EvaluationResult, path: str | os.PathLike[str]) -> None:
    """Write the JSON document of ``--json``; the file appears complete or not at all."""
    document = json.dumps(result.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(Path(path), document + "\n")


def write_csv(result: EvaluationResult, path: str | os.PathLike[str]) -> None:
    """Write all fields of all rows; intervals become two columns, lists are joined by ``; ``."""
    out = io.StringIO()
    flat = [_flat(row) for row in result.rows]
    writer = csv.DictWriter(out, fieldnames=list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_whole(Path(path), out.getvalue())


def _flat(row: Row) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in row.items():
        if key.endswith("_ci95"):
            low, high = value if isinstance(value, tuple | list) else (None, None)
            flat[f"{key}_low"], flat[f"{key}_high"] = low, high
        elif isinstance(value, list):
            flat[key] = "; ".join(str(v) for v in value)
        else:
            flat[key] = value
    return flat


def write_latex(result: EvaluationResult, path: str | os.PathLike[str]) -> None:
    """Write one booktabs ``tabular`` per condition; it needs no package but booktabs."""
    write_whole(Path(path), "\n".join(_tabular(rows) for rows in result.by_condition().values()))


def _tabular(rows: Sequence[Row]) -> str:
    columns = [c for c in _columns(rows) if c.head != "decide ms"]
    head = " & ".join(["policy", *(c.latex for c in columns)])
    lines = [f"% {_caption(columns)}", rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [rf"{head} \\", r"\midrule"]
    for row in rows:
        cells = [_escape(row["policy"]) + ("$^{*}$" if row["validity"] != "in_range" else "")]
        cells += [_latex(c.text(row)) for c in columns]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {line.strip()}" for line in _footnotes(rows)]
    return "\n".join(lines) + "\n"


def _latex(cell: str) -> str:
    """A number, interval or dash as LaTeX sets it."""
    if cell == NOTHING:
        return "--"
    return f"${cell}$" if cell.startswith("-") else cell.replace("..", "--")


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def write_png(result: EvaluationResult, path: str | os.PathLike[str]) -> None:
    """Write the picture of `ndp_gym.figure`."""
    from ndp_gym.figure import figure

    out = io.BytesIO()
    figure(result).savefig(out, format="png", dpi=120)
    write_whole(Path(path), out.getvalue())


def check_writable(path: Path) -> None:
    """Raise ``OSError`` where ``path`` cannot be written; call it before a long run, not after.

    Nothing is created: the nearest folder that exists must be one, and writeable.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write to a temporary name in the same folder, then rename; folders are made."""
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
