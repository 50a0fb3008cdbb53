"""``ndp-gym plan export``: what a policy decided, for real engines."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("json", "sglang", "ktransformers", "llama-cpp")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``plan`` and its sub-command."""
    text = "take what a policy decided to an engine"
    parser = subparsers.add_parser("plan", help=text, description=text.capitalize() + ".")
    commands = parser.add_subparsers(metavar="subcommand", required=True)
    text = "run a policy and write its placement for an engine"
    export = commands.add_parser(
        "export",
        help=text,
        description=text.capitalize() + "; prints what the format cannot say.",
        epilog="Example: ndp-gym plan export --policy balance --format ktransformers --out hot.pt",
    )
    add = export.add_argument
    add("--policy", metavar="P", required=True, help="a policy, as for evaluate")
    add("--format", choices=FORMATS, required=True, help="who is to read it")
    add("--out", metavar="F", type=Path, required=True, help="file to write")
    add("--at", choices=("majority", "last"), default="majority",
        help="plan of most windows, or of the last one (default: majority)")  # fmt: skip
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
    add("--max-windows", metavar="N", type=int, help="stop after N windows")
    add("--seed", metavar="N", type=int, default=0, help="of random policies (default: 0)")
    export.set_defaults(func=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Run, write the file whole or not at all, say what it cannot say; returns 0."""
    from ndp_gym.commands.evaluate import enough_memory, parse_budget, positive
    from ndp_gym.plan_export import decide
    from ndp_gym.plan_targets import TARGETS
    from ndp_gym.report import check_writable, write_whole

    target = TARGETS[args.format]
    if not args.out.name.endswith(target.suffix):
        raise ValueError(
            f"--out must end in {target.suffix} for {args.format}, which looks at it, "
            f"got {args.out.name}"
        )
    if args.seed < 0:
        raise ValueError(f"--seed must be >= 0, got {args.seed}")
    check_writable(args.out)
    with enough_memory(args):
        plan = decide(
            args.policy,
            args.trace,
            args.model,
            args.system,
            at=args.at,
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
    written = target.write(plan)
    write_whole(args.out, written.content)
    facts, tier = plan.facts, plan.placement.tier
    print(
        f"{facts['policy']} on {facts['trace']}: {int((tier == 0).sum())} of {tier.size} experts "
        f"in HBM, {facts['hbm_bytes']:,} of {facts['hbm_budget_bytes']:,} bytes "
        f"({args.at} of {facts['n_windows']} windows)"
    )
    print(f"wrote {args.out}")
    if written.usage:
        print(f"use it with: {written.usage.format(out=args.out)}")
    for text in written.left_out:
        print(f"not expressed: {text}")
    return 0
