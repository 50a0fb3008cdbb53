"""Options of a script: the fields of a dataclass, from the command line and from a YAML file.

A file has the argument names of Stable-Baselines3's zoo (``train/experiments/``): ``n_timesteps``
counts decode windows, ``n_envs`` copies of the environment, ``batch_size`` samples of a gradient
step; what belongs to the environment stands under ``env_kwargs``. Everything else goes by the name
of its option. Nothing in a file is evaluated.
"""

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

import yaml

from ndp_gym.cli import Parser, run_command

T = TypeVar("T")

ZOO_NAMES = {"n_timesteps": "n_windows", "n_envs": "n_lanes", "batch_size": "minibatch"}
"""The zoo's name -> that of our option."""


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


def from_file(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    """Options of a YAML file under our names; ``hints`` are the types of all options.

    Raises:
        ValueError: no map, a name that is no option, or a value of another type.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and len(content) == 1:
        (only,) = content.values()
        content = only if isinstance(only, dict) else content  # the zoo: a map per environment id
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a map of options, got {content!r}")
    found = {}
    for name, value in _flat(path, content, hints).items():
        if name not in hints:
            raise ValueError(f"{path}: no option {name!r}; options are {', '.join(hints)}")
        found[name] = _of_type(f"{path}: {name}", hints[name], value)
    return found


def _flat(path: Path, content: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """Our names; the maps ``env_kwargs`` and ``policy_kwargs`` taken apart."""
    flat = {ZOO_NAMES.get(name, name): value for name, value in content.items()}
    if "policy" not in hints and flat.pop("policy", "MlpPolicy") != "MlpPolicy":
        raise ValueError(f"{path}: policy must be MlpPolicy, got {content['policy']!r}")
    for group in ("env_kwargs", "policy_kwargs"):
        inner = flat.pop(group, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: {group} must be a map, got {inner!r}")
        flat |= inner
    if "net_arch" in flat:
        widths = flat.pop("net_arch")
        if not (isinstance(widths, list) and len(widths) == 2 and widths[0] == widths[1]):
            raise ValueError(f"{path}: net_arch must be two equal widths, got {widths!r}")
        flat["hidden"] = widths[0]
    rate = flat.get("learning_rate")
    if isinstance(rate, str) and rate.startswith("lin_"):  # ours always falls linearly
        try:
            flat["learning_rate"] = float(rate[4:])
        except ValueError:
            raise ValueError(f"{path}: learning_rate must be lin_<number>, got {rate!r}") from None
    return flat


def _of_type(name: str, hint: Any, value: Any) -> Any:
    """``value`` as the option's type; numbers may stand where the option is text."""
    wanted = hint if hint in (bool, int, float) else str
    words = [a for a in get_args(hint) if isinstance(a, str)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: is_number and int(value) == value,
        float: is_number,
        str: is_number or isinstance(value, str),
    }
    if words and value not in words:
        raise ValueError(f"{name} must be one of {words}, got {value!r}")
    if not fits[wanted]:
        raise ValueError(f"{name} must be {wanted.__name__}, got {value!r}")
    return wanted(value)


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
