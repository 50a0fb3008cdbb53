"""``ndp-gym list models|systems|policies|traces``: what can be named on the command line."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ndp_gym.commands import make_console

PROSE_WIDTH = 24
"""Columns from which on the cells of a last column without numbers may wrap."""


class Listing(NamedTuple):
    """A table: title, column heads (a leading ``>`` aligns right), rows and notes below.

    ``optional`` names the columns that a narrow terminal may do without, least needed first.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    optional: Sequence[str] = ()


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``list`` and its arguments."""
    text = "show the presets, policies and recordings that can be named"
    parser = subparsers.add_parser("list", help=text, description=text.capitalize() + ".")
    parser.add_argument("kind", choices=list(LISTINGS), help="what to list")
    parser.add_argument(
        "--sources", action="store_true", help="also print where each preset's numbers come from"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print one listing; returns the exit code 0."""
    from rich.table import Table

    listing = LISTINGS[args.kind](args.sources)
    console = make_console()
    shown, left_out = fitting(listing, console.width)
    table = Table(title=listing.title, title_justify="left")
    for index in shown:
        head = listing.columns[index]
        table.add_column(
            head.removeprefix(">"),
            justify="right" if head.startswith(">") else "left",
            overflow="fold",
            no_wrap=index < len(listing.columns) - 1,
        )
    for row in listing.rows:
        table.add_row(*(row[index] for index in shown))
    console.print(table)
    if left_out:
        console.print(
            f"Not shown at {console.width} columns: {', '.join(left_out)}.",
            markup=False,
            highlight=False,
        )
    for note in listing.notes:
        console.print(note, markup=False, highlight=False)
    return 0


def fitting(listing: Listing, width: int) -> tuple[list[int], list[str]]:
    """Indices of the columns that fit ``width`` terminal columns, and the heads of the others.

    A column is as wide as its longest cell, the last one at most ``PROSE_WIDTH``, and takes 3 for
    its border. Only ``listing.optional`` columns are left out.
    """
    last = len(listing.columns) - 1
    needs = [
        max(len(head.removeprefix(">")), *(len(row[index]) for row in listing.rows), 0)
        for index, head in enumerate(listing.columns)
    ]
    needs[last] = min(needs[last], PROSE_WIDTH)
    shown = list(range(last + 1))
    left_out = []
    for head in listing.optional:
        if 1 + sum(needs[index] + 3 for index in shown) <= width:
            break
        shown.remove(listing.columns.index(head))
        left_out.append(head.removeprefix(">"))
    return shown, left_out


def list_models(sources: bool) -> Listing:
    """All model presets with the sizes that decide where experts can live."""
    from ndp_gym import presets
    from ndp_gym.cost import kv_bytes

    specs = [presets.model(name) for name in presets.names("models")]
    rows = [
        [
            spec.name,
            f"{spec.n_layers}" + (f"+{spec.n_dense_layers}" if spec.n_dense_layers else ""),
            str(spec.n_experts),
            str(spec.top_k),
            str(spec.hidden_size),
            str(spec.expert_size),
            f"{spec.total_params / 1e9:.1f}",
            f"{spec.active_params / 1e9:.2f}",
            f"{spec.expert_params * 2 / 1e6:.1f}",
            f"{spec.routed_bytes16 / 1e9:.1f}",
            f"{kv_bytes(spec, 1) / 1024:.1f}",
            ", ".join(spec.assumed),
        ]
        for spec in specs
    ]
    columns = (
        *("model", ">layers", ">E", ">K", ">H", ">I", ">total 1e9", ">active 1e9"),
        *(">MB/expert", ">experts GB", ">KV KiB/token", "assumed"),
    )
    notes = ["Layers: routed + dense. Sizes at 16 bit. Assumed: recalled or approximated fields."]
    optional = ("assumed", ">H", ">I", ">KV KiB/token", ">active 1e9", ">MB/expert", ">total 1e9")
    return Listing("Models", columns, rows, [*notes, *_sources(specs, sources)], optional)


def list_systems(sources: bool) -> Listing:
    """All system presets: GPU, link and far device."""
    from ndp_gym import presets

    specs = [presets.system(name) for name in presets.names("systems")]
    rows = [
        [
            spec.name,
            spec.gpu.name,
            f"{spec.gpu.memory_bytes / 1e9:.0f}",
            f"{spec.gpu.bandwidth_bytes_per_s / 1e9:.0f}",
            f"{spec.link.bandwidth_bytes_per_s / 1e9:g}",
            f"{spec.link.latency_s * 1e6:g}",
            spec.far.name,
            f"{spec.far.memory_bytes / 1e9:.0f}",
            f"{spec.far.bandwidth_bytes_per_s * spec.far.efficiency / 1e9:.0f}",
            spec.default_service.kind,
            " ".join(map(str, spec.stored_bits)),
            spec.format.name,
        ]
        for spec in specs
    ]
    columns = (
        *("system", "GPU", ">HBM GB", ">HBM GB/s", ">link GB/s", ">link us", "far device"),
        *(">far GB", ">far GB/s", "service", "stored bits", "format"),
    )
    notes = ["Far GB/s is the effective rate (efficiency x peak). seed_sim is not a real device."]
    parts = [p for spec in specs for p in (spec, spec.gpu, spec.link, spec.far, spec.format)]
    optional = (
        *("format", "GPU", ">link us", "stored bits", ">HBM GB/s", "far device"),
        *(">far GB", ">HBM GB", "service"),
    )
    return Listing("Systems", columns, rows, [*notes, *_sources(parts, sources)], optional)


def _sources(specs: Sequence[object], wanted: bool) -> list[str]:
    """One line per distinct spec with its source and its assumed fields."""
    lines = {}
    for spec in specs if wanted else ():
        name, source = getattr(spec, "name", ""), getattr(spec, "source", "")
        assumed = ", ".join(getattr(spec, "assumed", ()))
        lines[name, source] = f"{name}: {source}" + (f" [assumed: {assumed}]" if assumed else "")
    return list(lines.values())


def list_policies(_sources_wanted: bool) -> Listing:
    """Bare policy names, where the ``policies`` package is importable."""
    from importlib import import_module

    columns = ("name", "factory", "what it does")
    try:
        package = import_module("policies")
    except ModuleNotFoundError as error:
        if error.name != "policies":
            raise
        note = (
            "Bare names need the policies folder of a checkout on the path; "
            "without it name a policy module:attribute or my_policy.py:Mine."
        )
        return Listing("Policies", columns, [], [note])
    rows = [[name, target, _summary(target)] for name, target in sorted(package.POLICIES.items())]
    notes = ["Others: module:attribute or my_policy.py:Mine."]
    return Listing("Policies", columns, rows, notes, optional=("factory",))


def _summary(target: str) -> str:
    """The first line of the docstring of ``module:attribute[:options]``."""
    from importlib import import_module

    module, attribute, *_ = target.split(":")
    found = getattr(import_module(module), attribute)
    return (found.__doc__ or "").strip().partition("\n")[0]


def list_traces(_sources_wanted: bool) -> Listing:
    """Recordings in the package, in the checkout's ``traces`` and in the working directory."""
    import numpy as np

    from ndp_gym.trace import RoutingTrace
    from ndp_gym.trace_requests import SPLITS

    package = Path(__file__).resolve().parent.parent
    folders = (package / "data", package.parent / "traces", Path.cwd())
    paths = {
        path.resolve(): None
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.glob("*.safetensors"))
    }
    rows = []
    for path in paths:
        try:
            trace = RoutingTrace.open(path)
        except ValueError:
            continue  # another kind of safetensors file, such as weights
        counts = np.bincount(trace.requests.split, minlength=len(SPLITS))
        rows.append(
            [
                path.name,
                trace.metadata.preset or trace.metadata.model,
                f"{trace.n_rows:,}",
                f"{trace.n_layers} x {trace.n_experts}, top-{trace.top_k}",
                "/".join(map(str, counts)),
                trace.metadata.licence,
                str(path.parent),
            ]
        )
    columns = ("trace", "model", ">rows", "L x E, K", "/".join(SPLITS), "licence", "folder")
    notes = ["Import other recordings with: ndp-gym trace import."]
    optional = ("licence", "/".join(SPLITS), "L x E, K", ">rows")
    return Listing("Traces", columns, rows, notes, optional)


LISTINGS: dict[str, Callable[[bool], Listing]] = {
    "models": list_models,
    "systems": list_systems,
    "policies": list_policies,
    "traces": list_traces,
}
