"""``ndp-gym quality``: measure what the experts of a checkpoint lose at each bitwidth."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndp_gym.quality_file import QualityFile
    from ndp_gym.quality_measure import Progress

_GAUSSIAN = "mse_g128"  # the format whose errors are those of Gaussian weights


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``quality`` with ``measure`` and ``info``."""
    text = "measure what quantization costs the experts of a checkpoint"
    parser = subparsers.add_parser("quality", help=text, description=text.capitalize() + ".")
    commands = parser.add_subparsers(metavar="command", required=True)

    measure = commands.add_parser(
        "measure",
        help="relative weight error of every expert at every bitwidth",
        description="Quantize every expert and write its relative weight error at each bitwidth.",
        epilog="Goes on where it was interrupted. Use the file with ndp-gym evaluate --quality F, "
        "or gym.make(..., quality=F).",
    )
    add = measure.add_argument
    add("--weights", metavar="W", type=Path, required=True,
        help="safetensors file, or folder of a checkpoint, in bf16, fp16 or fp32")  # fmt: skip
    add("--out", metavar="F", type=Path, required=True, help="the file to write")
    add("--model", metavar="M", help="model preset whose layers and experts it must have")
    add("--bits", metavar="B", default="8,4,3,2,1", help="bitwidths (default: 8,4,3,2,1)")
    add("--group", metavar="N", type=int, default=128,
        help="weights that share a scale (default: 128)")  # fmt: skip
    add("--threads", metavar="N", type=int, help="default: all cores")
    measure.set_defaults(func=run_measure)

    info = commands.add_parser("info", help="measured errors by layer and bitwidth")
    info.add_argument("file", metavar="F", type=Path)
    info.set_defaults(func=run_info)


def run_measure(args: argparse.Namespace) -> int:
    """Measure, write the file, print its table."""
    from ndp_gym import presets
    from ndp_gym.quality_measure import measure
    from ndp_gym.report import check_writable

    check_writable(args.out)
    model = presets.model(args.model) if args.model else None
    with _progress() as progress:
        found = measure(
            args.weights,
            args.out,
            bits=_bits(args.bits),
            group=args.group,
            name=model.name if model else None,
            shape=(model.n_layers, model.n_experts) if model else None,
            threads=(os.cpu_count() or 1) if args.threads is None else args.threads,
            progress=progress,
        )
    print_summary(found)
    print(f"wrote {args.out}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print the table of a file."""
    from ndp_gym.quality_file import QualityFile

    print_summary(QualityFile.open(args.file))
    return 0


def print_summary(found: QualityFile) -> None:
    """Mean error by layer and width, spread over experts, and the errors of Gaussian weights."""
    from rich import box
    from rich.table import Table

    from ndp_gym import presets
    from ndp_gym.commands import make_console

    error, gaussian = found.relative_error, presets.fmt(_GAUSSIAN).rel_mse
    n_layers, n_experts, _ = error.shape
    console = make_console()
    title = f"{found.model}: {n_layers} layers x {n_experts} experts, {found.method}"
    console.print(f"{title}, groups of {found.group}", style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("relative weight error", no_wrap=True)
    for bits in found.bits:
        table.add_column(f"{bits} bit", justify="right", no_wrap=True)
    for layer, row in zip(found.layers, error.mean(axis=1), strict=True):
        table.add_row(f"layer {layer}", *map(_figure, row))
    table.add_section()
    for name, row in (
        ("mean", error.mean(axis=(0, 1))),
        ("best expert", error.min(axis=(0, 1))),
        ("worst expert", error.max(axis=(0, 1))),
    ):
        table.add_row(name, *map(_figure, row), style="bold" if name == "mean" else "")
    table.add_row(f"Gaussian ({_GAUSSIAN})", *(_figure(gaussian.get(b)) for b in found.bits))
    ratios = [
        f"{mean / gaussian[bits]:.2f}" if gaussian.get(bits) else "-"
        for bits, mean in zip(found.bits, error.mean(axis=(0, 1)), strict=True)
    ]
    table.add_row("mean / Gaussian", *ratios)
    table.add_row("stored bits per weight", *(f"{bits:.2f}" for bits in found.stored_bits))
    console.print(table)


def _figure(error: float | None) -> str:
    """Three significant digits, in plain notation."""
    if error is None:
        return "-"
    if error == 0:
        return "0"
    text = f"{error:#.3g}"
    return text if "e" not in text else f"{error:.7f}"


def _bits(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"--bits must be numbers such as 4,3,2, got {text!r}") from None


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar of experts with the time left, on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("experts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("")

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        yield show
