"""``ndp-gym trace import|synthesize|info|verify|stats``: recordings on the command line."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndp_gym.trace import RoutingTrace

Rows = Iterable[Sequence[str]]
FORMATS = (
    "bigmoe",
    "grouped-nf4",
    "nvmoe",
    "hdmoe",
    "routertrace",
    "megatron",
    "llama-csv",
    "sglang",
    "sglang-recorder",
    "vllm",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``trace`` and its sub-commands."""
    text = "import or draw routing recordings, look at them and check them"
    parser = subparsers.add_parser("trace", help=text, description=text.capitalize() + ".")
    commands = parser.add_subparsers(metavar="subcommand", required=True)
    _add_import(commands)
    _add_synthesize(commands)
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


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "read foreign recordings and write one trace file"
    parser = commands.add_parser("import", help=text, description=text.capitalize() + ".")
    parser.add_argument(
        "paths", nargs="+", type=Path, help="files of one format, or a folder of them; .gz too"
    )
    parser.add_argument("--out", type=Path, required=True, help="trace file to write")
    parser.add_argument("--format", choices=FORMATS, help="default: recognised by content")
    parser.add_argument("--model", help="the model's name, or a model preset to check against")
    parser.add_argument("--licence", help="licence of the recording")
    parser.add_argument(
        "--experts", type=_positive, help="routed experts per layer, if not in file"
    )
    parser.add_argument("--top-k", type=_positive, help="experts per token, if not in file")
    parser.add_argument(
        "--spans", type=_numbers, default=(), help="rows where a request starts, as 399,798,1197"
    )
    parser.add_argument(
        "--prompt-tokens", type=_numbers, default=(), help="prefill rows: one number or one each"
    )
    parser.add_argument(
        "--drop-prefix", type=int, default=0, help="rows dropped at the start of every request"
    )
    parser.add_argument("--keep-loops", action="store_true", help="keep text that repeats itself")
    parser.add_argument("--seed", type=int, default=0, help="of the train/val/test split")
    parser.set_defaults(func=run_import)


def _add_synthesize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "draw a recording of any length that is routed like another, or like a model"
    parser = commands.add_parser("synthesize", help=text, description=text.capitalize() + ".")
    parser.add_argument("--like", help="a trace file, or a model preset")
    parser.add_argument("--requests", type=_whole, required=True, help="requests to draw")
    parser.add_argument(
        "--tokens", type=_whole, required=True, help="tokens of a request on average, prompt too"
    )
    parser.add_argument("--out", type=Path, required=True, help="trace file to write")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--layers", type=_positive, help="routed layers, if others than --like's")
    parser.add_argument("--experts", type=_positive, help="experts per layer, up to 1000")
    parser.add_argument("--top-k", type=_positive, help="experts per token")
    parser.add_argument(
        "--domain-run", type=_whole, default=1, help="requests in a row of one domain (default 1)"
    )
    parser.add_argument(
        "--loops", type=float, default=0.0, help="share of requests that end in a loop (default 0)"
    )
    parser.set_defaults(func=run_synthesize)


def run_synthesize(args: argparse.Namespace) -> int:
    """Draw and write a trace; returns 0."""
    from rich.console import Console
    from rich.progress import Progress

    from ndp_gym import synthesize

    out = _checked_out(args.out, [Path(args.like)] if args.like else [])
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {args.seed}")
    like = synthesize.pattern(
        args.like,
        n_layers=args.layers,
        n_experts=args.experts,
        top_k=args.top_k,
        seed=args.seed,
    )
    requests = synthesize.request_table(
        args.requests, args.tokens, like.domains, run=args.domain_run, seed=args.seed
    )
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("tokens", total=int(requests.length.sum()))
        trace = synthesize.write_trace(
            out,
            like,
            requests,
            seed=args.seed,
            loops=args.loops,
            progress=lambda rows: bar.advance(task, rows),
        )
    _print_info(trace, f"Wrote {out}: synthetic, not a recording")
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Import and write a trace; warnings go to stderr; returns 0."""
    from ndp_gym.importers import ImportOptions, import_trace

    out = _checked_out(args.out, args.paths)
    options = ImportOptions(
        model=args.model,
        licence=args.licence,
        n_experts=args.experts,
        top_k=args.top_k,
        spans=args.spans,
        n_prompt=args.prompt_tokens,
        drop_prefix=args.drop_prefix,
        keep_loops=args.keep_loops,
        seed=args.seed,
    )
    result = import_trace(args.paths, args.format, options)
    trace = result.trace.save(out)
    _print_info(trace, f"Wrote {out} from {result.format}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print metadata and splits of a trace; returns 0."""
    trace = _open(args.trace)
    _print_info(trace, str(args.trace))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Scan a trace; returns 0 if it is valid, and raises ``ValueError`` otherwise."""
    trace = _open(args.trace)
    trace.verify()
    _print_table(
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
    """Print the statistics of a trace; returns 0."""
    from ndp_gym.trace_stats import trace_statistics

    trace = _open(args.trace)
    s = trace_statistics(trace, args.phase, seed=args.seed, loops=not args.no_loops)
    uniform = trace.top_k / trace.n_experts
    rows = [
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
        ("rows in a loop", _number(s.looped_share), "share"),
        ("gate weight by rank", " ".join(map(_number, s.gate_profile or ())) or "none", ""),
    ]
    _print_table(f"{args.trace}: {args.phase} rows", ("statistic", "value", "beside it"), rows)
    return 0


def _checked_out(out: Path, inputs: Sequence[Path]) -> Path:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {out}")
    if any(path.exists() and out.exists() and path.samefile(out) for path in inputs):
        raise ValueError(f"--out must not be one of the files that are read, got {out}")
    return out


def _open(path: Path) -> "RoutingTrace":
    from ndp_gym.trace import RoutingTrace

    return RoutingTrace.open(path)


def _print_info(trace: "RoutingTrace", title: str) -> None:
    facts, r = trace.metadata, trace.requests
    shape = f"{trace.n_layers} layers, {trace.n_experts} experts, top-{trace.top_k}"
    sizes = facts.expert_bytes
    splits = [
        f"{name} {int((r.split == code).sum())} ({len(set(r.conversation[r.split == code]))})"
        for code, name in enumerate(("train", "val", "test"))
    ]
    rows = [
        ("model", facts.model + (f" (preset {facts.preset})" if facts.preset else "")),
        ("shape", shape),
        ("rows", f"{trace.n_rows:,}: {r.n_prompt.sum():,} prefill, {r.n_decode.sum():,} decode"),
        ("requests", f"{len(r)} in {r.n_conversations} conversations"),
        ("splits", "requests (conversations): " + ", ".join(splits)),
        ("domains", ", ".join(r.domains)),
        ("prefill", facts.phases),
        ("order of ids", facts.id_order),
        ("gate weights", "none" if trace.gate_weights is None else "float16"),
        ("expert bytes", "unknown" if sizes is None else f"{min(sizes):,}..{max(sizes):,}"),
        ("source", facts.source),
        ("licence", facts.licence),
        ("recorder", facts.recorder),
    ]
    _print_table(title, ("fact", "value"), rows)


def _print_table(title: str, columns: Sequence[str], rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _layers(bounds: tuple[float, float] | None, lag: int) -> str:
    return f"layers {bounds[0]:.3f}..{bounds[1]:.3f}" if bounds is not None and lag == 1 else ""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers as 399,798, got {text!r}"
        ) from None


def _positive(text: str) -> int:
    if not (text.isdigit() and 0 < len(text) < 6 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number in 1..65536, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not (text.isdigit() and 0 < len(text) < 12 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
