"""``python -m traces.record``: record which experts a Hugging Face model chooses.

Prompts are JSON lines: {"prompt": text or token ids} or {"messages": [...]}, with "conversation"
and "domain" where wanted. An interrupted recording leaves OUT.parts and goes on with --resume.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from ndp_gym.cli import Parser, run_command
from ndp_gym.commands.trace.printing import checked_out, print_info, progress_bar
from ndp_gym.importers.recording import content_warnings, matching_preset
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_file import file_sha256
from ndp_gym.trace_metadata import TraceMetadata
from traces.record.generate import Sampling
from traces.record.huggingface import TESTED, HuggingFaceModel
from traces.record.load import DTYPES, Source, load_encoder, load_model
from traces.record.prompts import (
    Prompt,
    check_shared_starts,
    encode_all,
    needs_tokenizer,
    read_lines,
)
from traces.record.run import Job, Progress, finish, pending, record
from traces.record.writer import Parts, read_facts

PROGRAM = "traces.record"


def build_parser() -> Parser:
    """The parser of ``python -m traces.record``."""
    default = Sampling()
    parser = Parser(
        prog="python -m traces.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder of a saved model, or its id on the hub")
    add("--prompts", type=Path, help="JSON lines, a request each")
    add("--out", type=Path, required=True, help="trace file to write")
    add("--max-new-tokens", type=int, default=default.n_tokens, metavar="N", help="per answer")
    add("--temperature", type=float, default=default.temperature, help="0 is greedy (default 1)")
    add("--top-p", type=float, default=default.top_p, help=f"default {default.top_p}")
    add("--seed", type=int, default=default.seed, help="of answers and splits")
    add("--batch-size", type=int, default=8, help="requests that run together (default 8)")
    add("--device", help="cpu, cuda, auto (spread; needs accelerate); default: a GPU if any")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as stored")
    add("--revision", help="branch, tag or commit on the hub")
    add("--preset", help="model preset that fits (checked), so that evaluate needs no --model")
    add("--licence", default="unknown", help="of the recording")
    add("--drop-prefix", type=int, default=0, metavar="N", help="rows of a template all share")
    add("--keep-loops", action="store_true", help="keep the rows of an answer that repeats itself")
    add("--ignore-eos", action="store_true", help="always generate N tokens")
    add("--resume", action="store_true", help="go on with the interrupted recording in OUT.parts")
    add("--assemble", action="store_true", help="only write what OUT.parts holds; needs no model")
    parser.set_defaults(func=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Record; returns 0, 2 for bad input (one sentence on stderr) or 130 when interrupted."""
    return run_command(PROGRAM, build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Record, or write what an interrupted recording left; returns 0."""
    out = checked_out(args.out, [args.prompts] if args.prompts else [])
    folder = out.with_name(out.name + ".parts")
    if args.assemble:
        return _assemble(out, folder)
    if args.model is None or args.prompts is None:
        raise ValueError("--model and --prompts must be given (or --assemble)")
    if folder.exists() and not args.resume:
        raise ValueError(
            f"{folder} holds an interrupted recording: go on with --resume, or remove it"
        )
    lines = read_lines(args.prompts)
    if args.resume and not folder.exists() and out.exists():
        return _already_complete(out, args.prompts, len(lines))
    sampling = Sampling(
        n_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(model=args.model, revision=args.revision, dtype=args.dtype, device=device)
    model = load_model(source, ignore_stop=args.ignore_eos)
    job = Job(
        prompts=_prompts(args, lines, source, model),
        sampling=sampling,
        batch_size=args.batch_size,
        drop_prefix=args.drop_prefix,
        keep_loops=args.keep_loops,
    )
    metadata = describe(model, args, sampling)
    facts = {"metadata": json.loads(metadata.to_json(())), "split_seed": args.seed}
    began = time.perf_counter()
    with Parts(folder, (len(model.routers), model.top_k), model.n_experts, facts) as parts:
        n_before = sum(entry["n_rows"] for entry in parts.entries)
        try:
            with _progress(parts, job) as progress:
                record(model, job, parts, progress)
        except BaseException as error:
            _rescue(parts, metadata, out, args.seed)
            if isinstance(error, torch.OutOfMemoryError):
                raise ValueError(f"out of memory at --batch-size {args.batch_size}") from None
            raise
        sources = {args.prompts.name: file_sha256(args.prompts)}
        trace = finish(parts, replace(metadata, source_sha256=sources), out, args.seed)
    parts.remove()
    _report(trace, f"Wrote {out}")
    n_rows, elapsed_s = trace.n_rows - n_before, time.perf_counter() - began
    print(f"{n_rows:,} tokens recorded in {elapsed_s:.1f} s: {n_rows / elapsed_s:,.0f} tokens/s")
    return 0


def describe(
    model: HuggingFaceModel, args: argparse.Namespace, sampling: Sampling
) -> TraceMetadata:
    """What the recording says about itself.

    Raises:
        ValueError: ``--preset`` is unknown or does not fit the model.
    """
    preset = matching_preset(args.preset, len(model.routers), model.top_k)
    if args.preset is not None and preset is None:
        raise ValueError(f"--preset must be a model preset, got {args.preset!r}")
    if preset is not None and preset[1] != model.n_experts:
        raise ValueError(f"model {preset[0]} has {preset[1]} experts, got {model.n_experts}")
    local = Path(args.model)
    return TraceMetadata(
        model=local.resolve().name if local.is_dir() else args.model,
        n_experts=model.n_experts,
        top_k=model.top_k,
        preset=args.preset,
        source=args.prompts.name,
        licence=args.licence,
        recorder="python -m traces.record",
        id_order="router_rank",
        expert_bytes=model.expert_bytes,
        layer_ids=model.layer_ids,
        extra={
            "architecture": model.architecture,
            "revision": args.revision,
            "gates": TESTED.get(model.architecture, "as the router returned them"),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "recorded_with": f"transformers {version('transformers')}, torch {torch.__version__}",
            "sampling": asdict(sampling),
            "stop_ids": sorted(model.stop_ids),
            "drop_prefix": args.drop_prefix,
            "keep_loops": args.keep_loops,
        },
    )


def _prompts(
    args: argparse.Namespace,
    lines: list[dict[str, object]],
    source: Source,
    model: HuggingFaceModel,
) -> list[Prompt]:
    encode = load_encoder(source) if needs_tokenizer(lines) else lambda _content: []
    prompts = encode_all(
        args.prompts,
        lines,
        encode,
        vocabulary_size=model.vocabulary_size,
        max_tokens=model.max_tokens,
        n_new=args.max_new_tokens,
    )
    check_shared_starts(args.prompts, prompts, args.drop_prefix)
    return prompts


@contextmanager
def _progress(parts: Parts, job: Job) -> Iterator[Progress]:
    """A bar with tokens per second and the time left, on a terminal only."""
    todo = pending(parts, job.prompts)
    total = sum(len(prompt.tokens) + job.sampling.n_tokens for prompt in todo)
    began, done = time.perf_counter(), 0
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=total)

        def advance(n_rows: int, n_spared: int) -> None:
            nonlocal done, total
            done, total = done + n_rows, total - n_spared
            rate = done / max(1e-9, time.perf_counter() - began)
            bar.update(task, advance=n_rows, total=total, description=f"{rate:,.0f} tokens/s")

        yield advance


def _rescue(parts: Parts, metadata: TraceMetadata, out: Path, seed: int) -> None:
    """Write what is finished when a recording stops early; the parts stay for ``--resume``."""
    if not parts.entries:
        parts.remove()
        return
    trace = finish(parts, metadata, out, seed)
    print(
        f"{PROGRAM}: stopped early: {out} holds the {len(trace.requests)} finished requests; "
        f"--resume goes on",
        file=sys.stderr,
    )


def _assemble(out: Path, folder: Path) -> int:
    facts = read_facts(folder)
    metadata, _ = TraceMetadata.from_json(json.dumps(facts["metadata"]), str(folder))
    shape = (facts["n_layers"], facts["top_k"])
    with Parts(folder, shape, facts["n_experts"], {}) as parts:
        if not parts.entries:
            raise ValueError(f"{folder} holds no finished request")
        trace = finish(parts, metadata, out, facts["split_seed"])
    _report(trace, f"Wrote the finished requests to {out}; {folder} stays for --resume")
    return 0


def _already_complete(out: Path, prompts: Path, n_lines: int) -> int:
    """Whether ``out`` answers this very file: then there is nothing to do, and 0 is returned."""
    trace = RoutingTrace.open(out)
    same = trace.metadata.source_sha256.get(prompts.name) == file_sha256(prompts)
    if not same or len(trace.requests) != n_lines:
        raise ValueError(f"--resume needs {out}.parts, and {out} is not the recording of {prompts}")
    print(f"{out} is complete: {n_lines} requests")
    return 0


def _report(trace: RoutingTrace, title: str) -> None:
    print_info(trace, title)
    extra = trace.metadata.extra
    if n_looped := extra["rows_cut_as_loops"]:
        print(f"{n_looped:,} rows of answers that repeat themselves left out (--keep-loops)")
    warnings = content_warnings(trace, loops_cut=bool(n_looped))
    if extra["architecture"] not in TESTED:
        warnings.append(f"architecture {extra['architecture']} is not among the tested ones")
    if joined := extra.get("conversations_joined"):
        warnings.append(f"{joined} conversations share text with another and were joined to it")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
