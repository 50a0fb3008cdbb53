"""``ndp-gym evaluate``: policies and the baselines under one or more conditions."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndp_gym.budget import HbmBudget
    from ndp_gym.evaluation import Progress
    from ndp_gym.results import EvaluationResult

_FORMATS = {"json": "json", "csv": "csv", "latex": "tex", "png": "png"}
_LEAST_BARE_BYTES = 1_000_000
_UNITS = ("KB", "MB", "GB", "TB", "KIB", "MIB", "GIB", "TIB")
_NOT_IN_ALL = ("all_far", "agent")  # families of which members are named
_EPILOG = (
    "Every condition also runs all_far4, all_hbm and all_hbm_mixed. All times are modeled. "
    "Example: ndp-gym evaluate --policies balance,lru,all_far:bits=3 --batch-size 1,8 --out runs/a"
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="compare policies on recorded routing",
        description="Compare placement policies on recorded routing.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--trace", metavar="T", help="trace files, comma-separated (default: the bundled one)")
    add("--model", metavar="M", help="model presets (default: the one each trace names)")
    add("--system", metavar="S", help="system presets (default: h100_cxl_seed_ndp)")
    add("--policies", metavar="P", default="all",
        help="names, module:attribute, file.py:Mine; options :key=value (default all)")  # fmt: skip
    add("--batch-size", metavar="B", default="8", help="slots, e.g. 1,8 (default: 8)")
    add("--window", metavar="W", type=int, default=16, help="decode steps per plan (default: 16)")
    add("--split", choices=("train", "val", "test"), default="test", help="default: test")
    add("--hbm-budget", metavar="X", default="0.10",
        help="share of 16-bit experts, bytes (8GB) or auto (default: 0.10)")  # fmt: skip
    add("--scheduling", choices=("continuous", "static"), default="continuous")
    add("--quality-weight", metavar="Q", default="balanced",
        help="speed, balanced, quality, or reward per nat (default: balanced)")  # fmt: skip
    add("--quality", metavar="F",
        help="measured errors (ndp-gym quality; default: the system's format)")  # fmt: skip
    add("--max-windows", metavar="N", type=int, help="stop each run after N windows")
    add("--seeds", metavar="N", type=int, default=1, help="seeds of random policies (default: 1)")
    add("--uncertainty", metavar="N", type=int, default=0,
        help="also run all under N samples of the uncertain constants")  # fmt: skip
    add("--profile", metavar="F",
        help="popularity in place of the train split's: imatrix, counts, .npy, trace")  # fmt: skip
    add("--bound", action="store_true",
        help="show the regret to a proved upper bound of the reward (slow)")  # fmt: skip
    for name in _FORMATS:
        add(f"--{name}", metavar="F", type=Path, help=f"write {name} to F")
    add("--out", metavar="DIR", type=Path, help="write everything into DIR")
    add("--wandb", choices=("offline", "online", "disabled"), help="track the run (default: not)")
    add("--wandb-project", metavar="P", default="ndp-gym")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, write what was asked for, say where."""
    from ndp_gym.evaluation import evaluate
    from ndp_gym.report import check_writable, print_tables

    for path in _outputs(args).values():
        check_writable(path)
    with _progress() as progress, enough_memory(args):
        result = evaluate(
            parse_policies(args.policies),
            _names("--trace", args.trace),
            _names("--model", args.model),
            _names("--system", args.system),
            batch_sizes=_integers("--batch-size", args.batch_size),
            window=args.window,
            hbm_budget=parse_budget(args.hbm_budget),
            split=args.split,
            scheduling=args.scheduling,
            quality_weight=_number_or_name(args.quality_weight),
            quality=args.quality,
            max_windows=positive("--max-windows", args.max_windows),
            seeds=range(_at_least_one("--seeds", args.seeds)),
            uncertainty=args.uncertainty,
            bound=args.bound,
            profile=args.profile,
            command=_command(),
            progress=progress,
        )
    print_tables(result)
    for path in _write(result, args):
        print(f"wrote {path}")
    return 0


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Format -> file, of what was asked for."""
    paths = {}
    for name, suffix in _FORMATS.items():
        asked = getattr(args, name)
        if asked or args.out:
            paths[name] = asked or args.out / f"evaluation.{suffix}"
    return paths


def _write(result: EvaluationResult, args: argparse.Namespace) -> Iterator[Path]:
    """Write every file asked for, then the tracked run, and name each."""
    from ndp_gym import report

    paths = _outputs(args)
    for name, path in paths.items():
        getattr(report, f"write_{name}")(result, path)
        yield path
    if args.wandb in ("offline", "online"):
        from ndp_gym.tracking import track_evaluation

        folder = track_evaluation(
            result,
            output_dir=args.out or Path("runs"),
            mode=args.wandb,
            project=args.wandb_project,
            image=paths.get("png"),
        )
        if folder is not None:
            yield folder


def parse_policies(text: str) -> list[str]:
    """Names separated by commas, where ``b=2`` after ``p:a=1,`` continues the options of ``p``.

    Raises:
        ValueError: an empty name.
    """
    from ndp_gym.contenders import BASELINES, registered_policies

    names: list[str] = []
    for item in text.split(","):
        if not item.strip():
            raise ValueError(f"--policies must be names separated by commas, got {text!r}")
        if names and "=" in item and ":" not in item:
            names[-1] += f",{item.strip()}"
        elif item.strip() == "all":
            named = [n for n in registered_policies() if n not in _NOT_IN_ALL]
            names += named or list(BASELINES)
        else:
            names.append(item.strip())
    return list(dict.fromkeys(names))


def parse_budget(text: str) -> HbmBudget:
    """``auto``, a share such as 0.1, or bytes such as 8000000000, 8GB or 7.5GiB.

    Raises:
        ValueError: anything else, and whole numbers from 1 to 999,999: as bytes they hold no
            expert, so a share or a unit was meant.
    """
    from ndp_gym import units

    if text == "auto":
        return text
    unit = next((u for u in reversed(_UNITS) if text.upper().endswith(u)), "")
    number = text[: len(text) - len(unit)].strip()
    try:
        if unit:
            return int(float(number) * getattr(units, unit))
        found = int(number) if number.lstrip("+-").isdigit() else float(number)
    except (ValueError, OverflowError):
        raise ValueError(
            f"--hbm-budget must be a share such as 0.1, bytes such as 8GB, or auto, got {text!r}"
        ) from None
    if isinstance(found, int) and 0 < found < _LEAST_BARE_BYTES:
        raise ValueError(
            f"--hbm-budget {text} means {found} B: write a share with a point (0.1, 1.0), or "
            f"bytes with a unit ({found}GB, {found}KB)"
        )
    return found


def positive(option: str, value: int | None) -> int | None:
    """``value`` unless it is below 1, which is a ``ValueError``; ``None`` stays."""
    return None if value is None else _at_least_one(option, value)


@contextmanager
def enough_memory(args: argparse.Namespace) -> Iterator[None]:
    """Turn arrays larger than memory into a ``ValueError`` that names the options behind them."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(
            f"--batch-size {args.batch_size} and --window {args.window} need more memory than "
            f"there is: {error}"
        ) from None


def _command() -> str:
    """The command line, as it can be typed again."""
    program = Path(sys.argv[0]).name
    typed = ["python", "-m", "ndp_gym"] if program == "__main__.py" else [program]
    return shlex.join([*typed, *sys.argv[1:]])


def _names(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [item.strip() for item in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} must be names separated by commas, got {text!r}")
    return names


def _integers(option: str, text: str) -> list[int]:
    try:
        found = [_at_least_one(option, int(item)) for item in text.split(",")]
        return list(dict.fromkeys(found))
    except ValueError:
        raise ValueError(f"{option} must be numbers >= 1 such as 1,8, got {text!r}") from None


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{option} must be >= 1, got {value}")
    return value


def _number_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar for the policy that runs, on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("")

        def show(label: str, done: int, total: int) -> None:
            bars.update(bar, description=label, completed=done, total=total)

        yield show
