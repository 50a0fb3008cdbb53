"""How sure the order of policies is, on a terminal: probabilities per pair, and what flips them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ndp_gym.uncertainty import Flip, Pair, Study

__all__ = ["print_study"]

MAX_LINES = 10
"""Pairs out of order's neighbourhood that are listed; the JSON has all."""


def print_study(study: Study, console: Console) -> None:
    """Print the order, how sure each place is against the next, and which other pairs flip."""
    from rich import box
    from rich.table import Table

    pairs = {(p["a"], p["b"]): p for p in study["pairs"]}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("by reward", no_wrap=True)
    table.add_column("P(beats next)", justify="right", no_wrap=True)
    table.add_column("one constant alone turns them round")
    for name, other in pairwise(names):
        pair = pairs[name, other]
        table.add_row(name, f"{pair['p_a_beats_b']:.2f}", _ends(pair))
    table.add_row(names[-1], "", "")
    console.print(
        f"  {study['n_samples']} samples of {len(study['constants'])} uncertain constants; "
        f"{study['plans']}",
        markup=False,
    )
    console.print(table)
    neighbours = set(pairwise(names))
    others = [p for key, p in pairs.items() if p["flips"] and key not in neighbours]
    for pair in others[:MAX_LINES]:
        console.print(f"  {_flip_line(pair)}", markup=False)
    if len(others) > MAX_LINES:
        console.print(f"  and {len(others) - MAX_LINES} more pairs whose order flips: see the JSON")


def _ends(pair: Pair) -> str:
    return ", ".join(_end(flip) for flip in pair["flipped_by"])


def _flip_line(pair: Pair) -> str:
    """Which constant, alone, turns the order of a pair round, else what it follows most."""
    head = f"{pair['a']} > {pair['b']} (P {pair['p_a_beats_b']:.2f})"
    if pair["flipped_by"]:
        return f"{head} flips at {_ends(pair)}"
    if pair["strongest"] is None:
        return f"{head} flips where several constants move"
    return (
        f"{head} flips only where several constants move, mostly with {pair['strongest']} "
        f"(rank correlation {pair['rank_correlation']:+.2f})"
    )


def _end(flip: Flip) -> str:
    value = flip["value"]
    text = {"factor": f"x {value:g}", "added": f"{value:+g}", "value": f"= {value:g}"}
    return f"{flip['constant']} {text[flip['kind']]}"
