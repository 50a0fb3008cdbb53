"""``ndp-gym trace import|fetch|synthesize``: the commands that write a trace."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ndp_gym.commands.trace.printing import checked_out, print_info, print_table, progress_bar

if TYPE_CHECKING:
    from ndp_gym.importers.fetch import Published

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
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
_FETCH_COLUMNS = ("name", "content", "size", "licence", "from github.com/")


def add_makers(commands: Commands) -> None:
    """Add the sub-commands that write a trace."""
    _add_import(commands)
    _add_fetch(commands)
    _add_synthesize(commands)


def _add_import(commands: Commands) -> None:
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


def _add_fetch(commands: Commands) -> None:
    text = "get a public recording by name, verify and import it; without a name, list them"
    parser = commands.add_parser("fetch", help=text, description=text.capitalize() + ".")
    parser.add_argument("name", nargs="?", help="a recording of the list")
    parser.add_argument("--out", type=Path, help="trace file to write (default NAME.safetensors)")
    parser.add_argument("--mirror", type=Path, help="folder that holds the files: no download")
    parser.add_argument("--cache", type=Path, help="folder that keeps what is downloaded")
    parser.add_argument("--seed", type=int, default=0, help="of the train/val/test split")
    parser.set_defaults(func=run_fetch)


def _add_synthesize(commands: Commands) -> None:
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


def run_import(args: argparse.Namespace) -> int:
    """Import and write a trace; warnings go to stderr; returns 0."""
    from ndp_gym.importers import ImportOptions, import_trace

    out = checked_out(args.out, args.paths)
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
    print_info(trace, f"Wrote {out} from {result.format}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Fetch, verify, import and write a public recording, or list them; returns 0."""
    from ndp_gym.importers import ImportOptions, fetch, import_trace

    if args.name is None:
        print_table("Public recordings", _FETCH_COLUMNS, map(_published_row, fetch.catalogue()))
        return 0
    recording = fetch.published(args.name)
    out = checked_out(args.out or Path(f"{args.name}.safetensors"), [])
    if args.mirror is not None:
        paths = fetch.from_mirror(recording, args.mirror)
    else:
        cache = args.cache or fetch.default_cache()
        with progress_bar() as bar:
            task = bar.add_task("bytes", total=recording.bytes)
            paths = fetch.download(recording, cache, progress=lambda n: bar.advance(task, n))
    result = import_trace(paths, recording.importer, ImportOptions(seed=args.seed))
    print_info(result.trace.save(out), f"Wrote {out} from {recording.repository}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _published_row(recording: "Published") -> tuple[str, ...]:
    size = f"{recording.bytes / 1e6:.1f} MB"
    return (recording.name, recording.content, size, recording.licence, recording.repository)


def run_synthesize(args: argparse.Namespace) -> int:
    """Draw and write a trace; returns 0."""
    from ndp_gym import synthesize

    out = checked_out(args.out, [Path(args.like)] if args.like else [])
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
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=int(requests.length.sum()))
        trace = synthesize.write_trace(
            out,
            like,
            requests,
            seed=args.seed,
            loops=args.loops,
            progress=lambda rows: bar.advance(task, rows),
        )
    print_info(trace, f"Wrote {out}: synthetic, not a recording")
    return 0


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
