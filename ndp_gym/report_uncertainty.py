"""How sure the order of policies is, on a terminal: probabilities per pair, and what flips them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ndp_gym.uncertainty import Flip, Pair, Study

__all__ = ["print_study"]

_LEGEND = (
    "P that the row's policy has the higher reward than the column's; ~ marks pairs and rows whose "
    "order flips"
)


def print_study(study: Study, console: Console) -> None:
    """Print the matrix of probabilities, best policy first, and one line per pair that flips."""
    from rich import box
    from rich.table import Table

    pairs = {(p["a"], p["b"]): p for p in study["pairs"]}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=_LEGEND)
    table.caption_justify = "left"
    table.add_column("P(row beats column)", no_wrap=True)
    for name in names[1:]:
        table.add_column(name, justify="right")
    for i, name in enumerate(names[:-1]):
        cells = [_cell(pairs[name, other]) for other in names[i + 1 :]]
        table.add_row(name, *[""] * i, *cells)
    console.print(
        f"  {study['n_samples']} samples of {len(study['constants'])} uncertain constants; "
        f"{study['plans']}",
        markup=False,
    )
    console.print(table)
    for pair in study["pairs"]:
        if pair["flips"]:
            console.print(f"  {_flip_line(pair)}", markup=False)


def _cell(pair: Pair) -> str:
    return f"{pair['p_a_beats_b']:.2f}{'~' if pair['flips'] else ''}"


def _flip_line(pair: Pair) -> str:
    """Which constant, alone, turns the order of a pair round, else what it follows most."""
    head = f"{pair['a']} > {pair['b']} (P {pair['p_a_beats_b']:.2f})"
    if pair["flipped_by"]:
        ends = ", ".join(_end(flip) for flip in pair["flipped_by"])
        return f"{head} flips at {ends}"
    if pair["strongest"] is None:
        return f"{head} flips where several constants move"
    return (
        f"{head} flips only where several constants move, mostly with {pair['strongest']} "
        f"(rank correlation {pair['rank_correlation']:+.2f})"
    )


def _end(flip: Flip) -> str:
    sign = {"factor": "x ", "added": "+ ", "value": "= "}[flip["kind"]]
    return f"{flip['constant']} {sign}{flip['value']:g}"
