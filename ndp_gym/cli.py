"""The command line: one parser over the modules of ``ndp_gym.commands``, one sentence per error."""

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import ndp_gym
from ndp_gym import commands

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Parser(argparse.ArgumentParser):
    """An argument parser that reports bad usage in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and leave with exit code 2."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but what a sub-command does not know is its error, not its parent's."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ndp-gym`` with one sub-command per module of ``ndp_gym.commands``."""
    parser = Parser(
        prog="ndp-gym",
        description="Place and quantize MoE experts across a GPU and a near-data processor.",
    )
    parser.add_argument("--version", action="version", version=f"ndp-gym {ndp_gym.__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code: 0, 2 for bad input (one sentence on stderr), 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    return run_command("ndp-gym", args)


def run_command(program: str, args: argparse.Namespace) -> int:
    """The exit code of ``args.func(args)``; an error is one sentence after ``program``."""
    try:
        code: int = args.func(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C within compiled code
            return EXIT_INTERRUPTED
        raise
    except BrokenPipeError:  # the reader (head, less) has left: nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"{program}: {_sentence(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
