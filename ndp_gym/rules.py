"""What numbers may be: rules by their wording, and one sentence where a number breaks its rule."""

from collections.abc import Callable, Mapping
from math import inf

RULES: dict[str, Callable[[float], bool]] = {
    "finite": lambda x: -inf < x < inf,
    "finite and > 0": lambda x: 0 < x < inf,
    "finite and >= 0": lambda x: 0 <= x < inf,
    "in 0..1": lambda x: 0 <= x <= 1,
    "0 or 1": lambda x: x in (0, 1),
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
}
"""Wording -> whether a number is so; no rule holds for nan."""


def check_number(name: str, rule: str, value: object) -> None:
    """Demand of ``value`` the rule of `RULES` that reads so.

    Raises:
        ValueError: it is no number, or is not so.
    """
    try:
        holds = RULES[rule](value)  # type: ignore[arg-type]  # what is no number raises
    except TypeError:
        holds = False
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check_numbers(owner: object, rules: Mapping[str, str]) -> None:
    """Demand of the attributes of ``owner`` the rule of `RULES` that stands beside their name.

    Raises:
        ValueError: the first that is no number, or is not as its rule says.
    """
    for name, rule in rules.items():
        check_number(name, rule, getattr(owner, name))
