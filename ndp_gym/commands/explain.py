"""``ndp-gym explain``: why one policy is faster than another on a recording."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndp_gym.explain import Explanation

_WIDTH = 24  # of the bars, in characters


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``explain``."""
    parser = subparsers.add_parser(
        "explain",
        help="why one policy is faster than another",
        description="Take the difference in seconds per token between two policies apart.",
        epilog="Example: ndp-gym explain balance ema --batch-size 4. All times are modeled.",
    )
    add = parser.add_argument
    add("a", metavar="A", help="a policy, as for evaluate")
    add("b", metavar="B", help="the policy it is compared with")
    add("--trace", metavar="T", help="trace file (default: the bundled one)")
    add("--model", metavar="M", help="model preset (default: the one the trace names)")
    add("--system", metavar="S", help="system preset (default: h100_cxl_seed_ndp)")
    add("--batch-size", metavar="B", type=int, default=8, help="slots (default: 8)")
    add("--window", metavar="W", type=int, default=16, help="decode steps per plan (default: 16)")
    add("--split", choices=("train", "val", "test"), default="test", help="default: test")
    add("--hbm-budget", metavar="X", default="0.10",
        help="share of 16-bit experts, bytes (8GB) or auto (default: 0.10)")  # fmt: skip
    add("--scheduling", choices=("continuous", "static"), default="continuous")
    add("--quality", metavar="F", help="measured errors (default: those of the system's format)")
    add("--profile", metavar="F", help="popularity of experts, as for evaluate")
    add("--max-windows", metavar="N", type=int, help="stop each run after N windows")
    add("--seed", metavar="N", type=int, default=0, help="of random policies (default: 0)")
    add("--json", metavar="F", type=Path, help="write json to F")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Explain, print the waterfall, write JSON where asked."""
    from ndp_gym.commands.evaluate import enough_memory, parse_budget, positive
    from ndp_gym.explain import explain
    from ndp_gym.report import check_writable, write_whole

    if args.json is not None:
        check_writable(args.json)
    if args.seed < 0:
        raise ValueError(f"--seed must be >= 0, got {args.seed}")
    with enough_memory(args):
        found = explain(
            args.a,
            args.b,
            args.trace,
            args.model,
            args.system,
            batch_size=args.batch_size,
            window=args.window,
            hbm_budget=parse_budget(args.hbm_budget),
            split=args.split,
            scheduling=args.scheduling,
            quality=args.quality,
            profile=args.profile,
            max_windows=positive("--max-windows", args.max_windows),
            seed=args.seed,
        )
    print_waterfall(found)
    if args.json is not None:
        write_whole(args.json, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {args.json}")
    return 0


def print_waterfall(found: Explanation) -> None:
    """From B through the six terms to A, in milliseconds per token."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ndp_gym.results import MODELED

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=int(os.environ.get("COLUMNS", 100)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=MODELED)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for head in ("ms/token", "share", "hit %", "bits", "ΔNLL"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    difference = float(found.difference)
    largest = max(abs(float(value)) for value in found.terms.values()) or 1.0
    for side in (found.b, found.a):
        hits, loss = f"{100 * side.hit_rate:.0f}", f"{side.delta_nll_nats:.3f}"
        facts = (hits, f"{side.mean_bits:.1f}", loss)
        if side is found.a:
            for name, exact in found.terms.items():
                value = float(exact) if abs(exact) > 1e-9 * largest else 0.0
                share = f"{100 * value / difference:.0f} %" if value and difference else ""
                bar = ("-" if value < 0 else "+") * round(_WIDTH * abs(value) / largest)
                text = f"{1e3 * value:+.4f}" if value else "0"
                table.add_row(f"  {name}", text, share, "", "", "", bar)
        table.add_row(side.policy, f"{1e3 * float(side.s_per_token):.4f}", "", *facts, style="bold")
    console.print(f"{found.condition}, {found.n_tokens} tokens", style="bold", markup=False)
    console.print(table)
    speed = float(found.b.s_per_token / found.a.s_per_token)
    console.print(f"{found.a.policy} decodes {speed:.2f} x as fast as {found.b.policy}")
