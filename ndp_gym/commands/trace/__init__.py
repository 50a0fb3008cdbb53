"""``ndp-gym trace import|fetch|synthesize|info|verify|stats``: recordings on the command line."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ndp_gym.commands.trace.make import FORMATS, add_makers
from ndp_gym.commands.trace.printing import checked_out, print_info, print_table

if TYPE_CHECKING:
    from ndp_gym.trace import RoutingTrace
    from ndp_gym.trace_stats import TraceStatistics

__all__ = ["FORMATS", "add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``trace`` and its sub-commands."""
    text = "import, fetch or draw routing recordings, look at them and check them"
    parser = subparsers.add_parser("trace", help=text, description=text.capitalize() + ".")
    commands = parser.add_subparsers(metavar="subcommand", required=True)
    add_makers(commands)
    for name, run, text in (
        ("info", run_info, "show what a trace says about itself; reads the header only"),
        ("verify", run_verify, "scan the whole content, and look for text shared by two splits"),
        ("stats", run_stats, "popularity, locality and similarity of the routing"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("trace", type=Path, help="a trace file")
        command.set_defaults(func=run)
        if name == "stats":
            command.add_argument("--phase", choices=("all", "prefill", "decode"), default="all")
            command.add_argument(
                "--no-loops", action="store_true", help="skip the search for loops"
            )
            command.add_argument("--seed", type=int, default=0, help="of the shuffled control")
            command.add_argument(
                "--html", type=Path, metavar="F", help="also write one page with charts, offline"
            )


def run_info(args: argparse.Namespace) -> int:
    """Print metadata and splits of a trace; returns 0."""
    trace = _open(args.trace)
    print_info(trace, str(args.trace))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Scan a trace; returns 0 if it is valid, and raises ``ValueError`` otherwise."""
    trace = _open(args.trace)
    trace.verify()
    print_table(
        f"{args.trace}: valid",
        ("checked", "result"),
        [
            ("rows", f"{trace.n_rows:,} x {trace.n_layers} layers, ids distinct and in range"),
            ("gate weights", "none" if trace.gate_weights is None else "finite and >= 0"),
            ("requests", f"{len(trace.requests)}, in order and inside the rows"),
            ("splits", "no text of 64 tokens in two splits"),
            ("sha256", trace.sha256),
        ],
    )
    return 0


def run_stats(args: argparse.Namespace) -> int:
    """Print the statistics of a trace, and write them as a page with ``--html``; returns 0."""
    from ndp_gym.trace_stats import trace_statistics

    out = None if args.html is None else checked_out(args.html, [args.trace], "--html")
    trace = _open(args.trace)
    s = trace_statistics(trace, args.phase, seed=args.seed, loops=not args.no_loops)
    rows = _statistics_table(trace, s)
    print_table(f"{args.trace}: {args.phase} rows", ("statistic", "value", "beside it"), rows)
    if out is not None:
        from ndp_gym.trace_page import write_page

        write_page(out, trace, s, rows, phase=args.phase, seed=args.seed)
        print(f"Wrote {out}")
    return 0


def _statistics_table(trace: "RoutingTrace", s: "TraceStatistics") -> list[tuple[str, str, str]]:
    """Rows of statistic, value and what stands beside it."""
    uniform = trace.top_k / trace.n_experts
    return [
        ("rows, requests", f"{s.n_rows:,}, {s.n_requests:,}", ""),
        ("Zipf exponent", _number(s.zipf), f"per request {_number(s.zipf_request)}"),
        ("entropy / ln E", _number(s.entropy), f"per request {_number(s.entropy_request)}"),
        ("share of hottest 10 %", _number(s.top10_share), f"max/mean {_number(s.max_over_mean)}"),
        (
            "overlap by chance",
            _number(s.chance),
            f"per request {_number(s.chance_request)}, uniform {_number(uniform)}",
        ),
        *[
            (f"overlap at lag {n}", _number(v), _layers(s.overlap_layers, n))
            for n, v in s.overlap.items()
        ],
        *[
            (f"coverage of {w} rows", _number(v), f"shuffled {_number(s.coverage_shuffled[w])}")
            for w, v in s.coverage.items()
        ],
        *[
            (f"{what}: cosine", _number(a), f"Spearman {_number(b)}")
            for what, a, b in (
                ("prefill and decode", s.prefill_cosine, s.prefill_spearman),
                ("two domains", s.domain_cosine, s.domain_spearman),
                ("two requests", s.request_cosine, s.request_spearman),
            )
        ],
        (
            "next-layer recall",
            _number(s.next_layer_recall),
            f"by popularity {_number(s.next_layer_popularity)}",
        ),
        (
            "share of rows in a loop",
            _number(s.looped_share),
            "not searched" if s.looped_share is None else "",
        ),
        ("gate weight by rank", " ".join(map(_number, s.gate_profile or ())) or "none", ""),
    ]


def _open(path: Path) -> "RoutingTrace":
    from ndp_gym.trace import RoutingTrace

    return RoutingTrace.open(path)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _layers(bounds: tuple[float, float] | None, lag: int) -> str:
    return f"layers {bounds[0]:.3f}..{bounds[1]:.3f}" if bounds is not None and lag == 1 else ""
