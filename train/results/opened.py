"""How often a test split was opened: a list beside the script, to which every run adds itself.

And the last section of a page, which says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from ndp_gym.provenance import package_versions
from ndp_gym.report import write_whole


class Opening(TypedDict):
    """One run over test: the day, the commit that ran (or that holds what it wrote), and why."""

    date: str
    commit: str | None
    why: str


def openings(path: Path) -> list[Opening]:
    """Those noted so far, the first one first; none where there is no file."""
    if not path.is_file():
        return []
    found: list[Opening] = json.loads(path.read_text(encoding="utf-8"))
    return found


def note_opening(path: Path, commit: str | None, why: str) -> list[Opening]:
    """Add one, before anything is measured, since a run that fails has seen test too."""
    today = datetime.now(UTC).date().isoformat()
    noted = [*openings(path), Opening(date=today, commit=commit, why=why)]
    write_whole(path, json.dumps(noted, indent=1) + "\n")
    return noted


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What made a page: options that are not the defaults, less what is of one machine alone.

    That are paths and the number of processes.
    """
    words = parser.prog.split()
    for name, value in vars(args).items():
        is_own = isinstance(value, Path) or name == "jobs"
        if value != parser.get_default(name) and not is_own:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def table(noted: list[Opening]) -> list[str]:
    """The lines of a markdown table."""
    rows = [
        f"| {number} | {opening['why']} | `{(opening['commit'] or 'unknown')[:12]}` |"
        for number, opening in enumerate(noted, 1)
    ]
    return ["| opening | why | commit |", "|---|---|---|", *rows]


def provenance(
    commit: str | None, facts: str, sentences: Sequence[str], what: str, noted: list[Opening]
) -> Iterator[str]:
    """The section: versions, further ``facts``, ``sentences``, and when ``what`` was opened."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    yield "## Provenance"
    yield ""
    yield f"Commit `{commit or 'unknown'}`; {versions}.{facts}"
    yield from sentences
    if noted:
        yield ""
        yield f"{what.format(len(noted))}:"
        yield ""
        yield from table(noted)
