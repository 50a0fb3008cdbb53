"""``ndp-gym validate``: published measurements beside what the project computes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ndp_gym.validation.recordings import Recordings
    from ndp_gym.validation.results import Row
    from ndp_gym.validation.summary import Validation

PLAIN_WIDTH = 180
SOURCE_FROM_WIDTH = 130
"""Terminal columns from which on the sources are shown."""
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
    from rich.console import Console

    from ndp_gym.report import check_writable
    from ndp_gym.validation.recordings import Recordings
    from ndp_gym.validation.summary import validate

    if args.recordings is not None and not args.recordings.is_dir():
        raise ValueError(f"--recordings must be a folder, got {args.recordings}")
    if args.json is not None:
        check_writable(args.json)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
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
    return EXIT_UNEXPECTED_FAILURE if found.unexpected else 0


def _print_rows(console: Console, found: Validation) -> None:
    from rich import box
    from rich.table import Table

    from ndp_gym.validation.results import by_group

    with_source = console.width >= SOURCE_FROM_WIDTH
    for group, rows in by_group(found.rows).items():
        table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("target", overflow="fold")
        if with_source:
            table.add_column("source", overflow="fold")
        for head in ("published", "ours", "ratio"):
            table.add_column(head, justify="right", no_wrap=True)
        for head in ("kind", "tolerance", "ok"):
            table.add_column(head, no_wrap=True)
        for row in rows:
            style = {True: None, False: "red", None: "dim"}[row.ok]
            target, source, *others = _cells(row)
            table.add_row(target, *([source] if with_source else []), *others, style=style)
        console.print(table)


def _cells(row: Row) -> list[str]:
    from rich.markup import escape

    from ndp_gym.validation.summary import number, ours, status, tolerance

    t = row.target
    published, ratio = f"{t.published:g}", number(row.ratio)
    cells = [t.id, t.source, published, ours(row), ratio, t.kind, tolerance(row), status(row)]
    return [escape(cell) for cell in cells]


def _print_summary(console: Console, found: Validation, recordings: Recordings) -> None:
    from ndp_gym.validation.summary import count_line, error_lines, fold_cells, ordering_cells

    lines = [count_line(found), *error_lines(found), "without one source:"]
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
