"""Options of a script: the fields of a dataclass, from the command line and from a YAML file."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from ndp_gym.cli import Parser, run_command
from train.conf_file import from_file

T = TypeVar("T")


Completion = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Options that were named -> those, and others that follow from them."""


def run(
    kind: type[T],
    main: Callable[[T], object],
    description: str,
    completed: Completion = dict,
) -> NoReturn:
    """Parse the command line, run ``main`` on it, and end the program as ``ndp-gym`` ends.

    The exit code is 0, 2 for bad input (one sentence on stderr), 130 when interrupted.
    """
    options = parse(kind, None, description, completed)

    def func(_: argparse.Namespace) -> int:
        main(options)
        return 0

    sys.exit(run_command(_program(), argparse.Namespace(func=func)))


def _program() -> str:
    """What was started, as one types it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def parse(
    kind: type[T], argv: Sequence[str] | None, description: str, completed: Completion = dict
) -> T:
    """The options ``kind`` that the command line gives; help texts are the docstrings of fields.

    Words of a name may be joined by hyphens or, as sweeps have them, by underscores. Ends the
    program with one sentence where an option or the file is wrong.
    """
    argv = [_hyphened(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = Parser(prog=_program(), description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--conf-file", metavar="F", help="YAML with options; those given here win")
    hints, texts = get_type_hints(kind), _docstrings(kind)
    for field in fields(kind):  # type: ignore[arg-type]  # every caller's is a dataclass
        _add_option(parser, field, hints[field.name], texts[field.name])
    given = vars(parser.parse_args(argv))
    path = given.pop("conf_file", None)
    try:
        in_file = {} if path is None else from_file(Path(path), hints)
        return kind(**completed({**in_file, **given}))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _hyphened(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _add_option(parser: argparse.ArgumentParser, field: Field[Any], hint: Any, text: str) -> None:
    assert field.default is not MISSING
    name = "--" + field.name.replace("_", "-")
    is_plain = field.default is None or field.default is False
    shown = text if is_plain else f"{text} (default: {field.default})"
    shown = shown.replace("%", "%%")
    words = [a for a in get_args(hint) if isinstance(a, str)]
    if hint is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=shown)
    elif words:
        parser.add_argument(name, choices=words, help=shown)
    else:
        kind = hint if hint in (int, float) else str
        parser.add_argument(name, type=kind, metavar="X", help=shown)


def _docstrings(kind: type) -> dict[str, str]:
    """Text below each field of a dataclass and of what it inherits from."""
    found = {}
    for owner in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            ):  # fmt: skip
                found[field.target.id] = str(text.value.value)
    return found
