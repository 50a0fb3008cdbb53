"""A heuristic with the constants that ``train.tune`` found: ``tuned:path=runs/tune/balance``."""

import json
from pathlib import Path
from typing import Any

from ndp_gym.policy import Policy, needs_future, resolve

SHIPPED = Path(__file__).resolve().parent / "tunings"


def read_tuning(path: str) -> tuple[Path, dict[str, Any]]:
    """A file of ``train.tune``, by path or by the name of one in ``policies/tunings``: its content.

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
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: not a file of train.tune, which has a 'spec'") from None
    if not isinstance(spec, str):
        raise ValueError(f"{file}: spec must be the name of a policy, got {spec!r}")
    return file, content


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
