"""``ndp-gym validate``: published measurements beside what the project computes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ndp_gym.commands import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from ndp_gym.validation.recordings import Recordings
    from ndp_gym.validation.results import Row
    from ndp_gym.validation.summary import Validation

COLUMNS = ("target", "source", "published", "ours", "ratio", "kind", "tolerance", "ok")
OPTIONAL = ("source", "tolerance", "kind", "ratio")
"""Columns that a narrow terminal does without, least needed first."""
SOURCE_WIDTH = 24
"""Terminal columns that the source asks for; longer ones wrap."""
EXIT_UNEXPECTED_FAILURE = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``validate``."""
    parser = subparsers.add_parser(
        "validate",
        help="compare published measurements with what the model computes",
        description="Compare published measurements with what the model computes. "
        "Exit code 1 if a row fails that was not expected to.",
    )
    add = parser.add_argument
    add("--json", metavar="F", type=Path, help="write all rows and the summary to F")
    add("--recordings", metavar="DIR", type=Path,
        help="folder of the public recordings (default: ../shared/traces)")  # fmt: skip
    add("--write-docs", metavar="DIR", type=Path, nargs="?", const=Path("docs"),
        help="write validation.md and its pictures into DIR (default: docs)")  # fmt: skip
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compute, print the tables and the summary, write what was asked for."""
    from ndp_gym.report import check_writable
    from ndp_gym.validation.recordings import Recordings
    from ndp_gym.validation.summary import count_line, validate

    if args.recordings is not None and not args.recordings.is_dir():
        raise ValueError(f"--recordings must be a folder, got {args.recordings}")
    if args.json is not None:
        check_writable(args.json)
    console = make_console()
    recordings = Recordings(args.recordings)
    with console.status("computing all rows, ten seconds or so"):
        found = validate(recordings)
    _print_rows(console, found)
    _print_summary(console, found, recordings)
    if args.json is not None:
        _write_json(found, args.json)
        console.print(f"wrote {args.json}", markup=False, highlight=False)
    if args.write_docs is not None:
        for path in _write_docs(found, recordings, args.write_docs):
            console.print(f"wrote {path}", markup=False, highlight=False)
    console.print(count_line(found), style="bold", markup=False, highlight=False, soft_wrap=True)
    return EXIT_UNEXPECTED_FAILURE if found.unexpected else 0


def _print_rows(console: Console, found: Validation) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ndp_gym.validation.results import by_group

    for group, rows in by_group(found.rows).items():
        table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD)
        table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
        cells = [_cells(row) for row in rows]
        shown = _fitting(cells, console.width)
        for head in shown:
            is_number = head in ("published", "ours", "ratio")
            justify: Literal["left", "right"] = "right" if is_number else "left"
            no_wrap = head not in ("target", "source")
            table.add_column(head, justify=justify, overflow="fold", no_wrap=no_wrap)
        for row, texts in zip(rows, cells, strict=True):
            style = {True: None, False: "red", None: "dim"}[row.ok]
            table.add_row(*(Text(texts[head]) for head in shown), style=style)
        console.print(table)
        console.print()


def _fitting(cells: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns whose longest cells fit ``width`` terminal columns, 2 between neighbours."""
    needs = {head: max(len(head), *(len(row[head]) for row in cells)) for head in COLUMNS}
    needs["source"] = min(needs["source"], SOURCE_WIDTH)
    shown = list(COLUMNS)
    for head in OPTIONAL:
        if sum(needs[name] + 2 for name in shown) - 2 > width:
            shown.remove(head)
    return shown


def _cells(row: Row) -> dict[str, str]:
    """The texts of a row by the head of their column."""
    from ndp_gym.validation.summary import number, ours, status, tolerance

    t = row.target
    texts = (t.id, t.source, f"{t.published:g}", ours(row), number(row.ratio), t.kind)
    return dict(zip(COLUMNS, (*texts, tolerance(row), status(row)), strict=True))


def _print_summary(console: Console, found: Validation, recordings: Recordings) -> None:
    from ndp_gym.validation.summary import error_lines, fold_cells, ordering_cells

    lines = [*error_lines(found), "without one source:"]
    for fold in found.folds:
        name, left_out, fitted, in_use, outcome = map(str, fold_cells(fold))
        lines.append(f"- {name} = {fitted} (in use {in_use}) without {left_out}: {outcome}")
    lines.append("Kendall tau against measured orderings:")
    for ordering in found.orderings:
        name, tau, pairs = ordering_cells(ordering)
        lines.append(f"- {name.removeprefix('- ')}: {tau}, {pairs}")
    reasons: dict[str, list[str]] = {}
    for row in found.expected_failures:
        reasons.setdefault(row.reason, []).append(row.target.id)
    lines += [f"fails as expected: {', '.join(ids)}: {why}" for why, ids in reasons.items()]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for file in found.missing:
        n_rows = sum(row.ok is None and file.below in row.skipped for row in found.rows)
        text = f"SKIPPED {n_rows} rows: get {file.text}, as {file.below} below {recordings.folder}"
        console.print(text, style="bold yellow", markup=False, highlight=False)
    for row in found.unexpected:
        console.print(f"FAILS UNEXPECTEDLY: {row.target.id}", style="bold red", markup=False)


def _write_json(found: Validation, path: Path) -> None:
    from ndp_gym.provenance import git_commit, package_versions

    document = {
        **found.to_dict(),
        "provenance": {"commit": git_commit(), "versions": dict(package_versions())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_docs(found: Validation, recordings: Recordings, folder: Path) -> list[Path]:
    """The page and its pictures; nothing is written if a recording is missing."""
    from ndp_gym.validation import page, plots

    page_text = page.text(found, recordings)
    files = {folder / "img" / name: data for name, data in plots.draw_all(found.rows).items()}
    files[folder / "validation.md"] = page_text.encode()
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return list(files)
