"""The sub-commands of ``ndp-gym``, one module each.

A module ``ndp_gym.commands.<name>`` defines ``add_parser(subparsers)``: it adds the parser called
``<name>`` and sets its ``func``, which takes the parsed arguments and returns the exit code. What
is slow to import is imported inside ``func``.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 180
"""Columns where the output is not a terminal and ``COLUMNS`` does not say otherwise."""


def make_console() -> "Console":
    """A console as wide as the terminal, as ``COLUMNS`` says, or ``PLAIN_WIDTH`` columns."""
    from rich.console import Console

    console = Console()
    given = os.environ.get("COLUMNS", "")
    if console.is_terminal:
        return console
    return Console(width=int(given) if given.isdigit() and int(given) else PLAIN_WIDTH)
