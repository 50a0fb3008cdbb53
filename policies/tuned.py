"""A heuristic with constants that ``train.tune`` found: ``tuned:path=runs/tune/balance_fix``."""

import json
from pathlib import Path
from typing import Any

from ndp_gym.policy import Policy, needs_future, resolve, split_options
from policies import POLICIES

SHIPPED = Path(__file__).resolve().parent / "tunings"


def read_tuning(path: str) -> tuple[Path, dict[str, Any]]:
    """A file of ``train.tune``, by path or by the name of one in ``policies/tunings``: its content.

    ``spec`` names one of `POLICIES` with numbers as options, and ``constants`` are those numbers:
    whoever follows a tuning runs no code but that of the built-in policies.

    Raises:
        ValueError: the file is none of ``train.tune``.
        OSError: the file cannot be read.
    """
    name = path.removesuffix(".json") + ".json"
    shipped = SHIPPED / name
    file = shipped if shipped.is_file() else Path(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        spec = content["spec"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file}: not a file of train.tune, which has a 'spec'") from None
    constants = _constants(file, spec)
    if content.get("constants", constants) != constants:
        raise ValueError(f"{file}: constants must be those of spec, {constants}")
    return file, {**content, "constants": constants}


def _constants(file: Path, spec: object) -> dict[str, float]:
    """The options of a built-in policy, all numbers; anything else is refused, and not loaded."""
    try:
        policy, options = split_options(spec) if isinstance(spec, str) else ("", {})
    except (ValueError, RecursionError, MemoryError):
        policy, options = "", {}
    numbers = all(type(value) in (int, float) for value in options.values())
    if policy not in POLICIES or not numbers:
        raise ValueError(
            f"{file}: spec must be the name of a policy that is built in, with numbers as options, "
            f"got {spec!r}"
        )
    return options


def tuned(path: str = "balance_fix") -> Policy:
    """The policy that a file of ``train.tune`` names, with the constants it holds.

    Args:
        path: of the file, ``.json`` may be left out, or the name of one in ``policies/tunings``.

    Raises:
        ValueError: the file is none of ``train.tune``, or names an oracle.
        OSError: the file cannot be read.
    """
    file, content = read_tuning(path)
    spec = content["spec"]
    factory = resolve(spec)
    if needs_future(factory):
        raise ValueError(f"{file}: {spec.partition(':')[0]} is an oracle, which goes by its name")
    return factory()
