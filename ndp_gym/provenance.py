"""Where results come from: commit, versions, environment and machine, as JSON values."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import ndp_gym
from ndp_gym.quality import QualityModel
from ndp_gym.specs import MoESpec, SystemSpec

__all__ = ["env_spec_json", "git_commit", "package_versions", "quality_facts", "spec_facts"]

_PACKAGES = ("gymnasium", "numba", "numpy")


@cache
def git_commit() -> str | None:
    """Commit of the checkout that ndp_gym runs from, ``+changes`` where tracked files differ.

    ``None`` where ndp_gym is installed, or git is absent: a repository that merely contains the
    site-packages folder is not ours.
    """
    here = Path(__file__).resolve()
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git(here, "rev-parse", "HEAD")
    changes = _git(here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(file: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *args], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def package_versions(*more: str) -> Mapping[str, str]:
    """Versions of Python, ndp-gym and what its numbers depend on; nothing is imported for it.

    ``more`` are other distributions that a result depends on.
    """
    found = {"python": platform.python_version(), "ndp-gym": ndp_gym.__version__}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def env_spec_json(kwargs: Mapping[str, Any]) -> str:
    """JSON of the Gymnasium spec with ``kwargs``: what ``EnvSpec.from_json`` turns back."""
    import gymnasium

    spec = copy(gymnasium.spec(ndp_gym.ENV_ID))  # that of the registry holds what gym.make takes
    spec.kwargs = dict(kwargs)
    return spec.to_json()


def spec_facts(spec: MoESpec | SystemSpec) -> dict[str, Any]:
    """Every field of a model or system as JSON values, since a name does not show what was edited.

    Integer keys (bitwidths) become text, as JSON has it.
    """
    facts = _json(asdict(spec))
    assert isinstance(facts, dict)
    return facts


def quality_facts(quality: QualityModel) -> dict[str, Any]:
    """What turned errors into nats: ``kappa``, and shape and digest of a measured table."""
    table = quality.table
    if table is None:
        return {"kappa": quality.kappa, "table_shape": None, "table_sha256": None}
    digest = sha256(np.ascontiguousarray(table, dtype="<f8").tobytes()).hexdigest()
    return {"kappa": quality.kappa, "table_shape": list(table.shape), "table_sha256": digest}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value
