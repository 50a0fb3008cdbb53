"""Going on with a run of ``train.ppo``: its options are those that it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ndp_gym.agent_file import load_agent
from train.setting import Setting

NOT_IN_CARD = ("out", "resume", "wandb", "wandb_project")
"""Options that change nothing about the agent."""
MAY_CHANGE = {*NOT_IN_CARD, "n_windows", "eval_every"}
"""Options that a run which goes on may have anew."""


def with_saved(kind: type[Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and where it resumes a run, the options of that run for all it leaves out.

    Args:
        kind: of the options.
        given: options by name; ``out`` and ``resume`` say which run goes on.

    Raises:
        ValueError: there is no such run, or a file of it is damaged.
        OSError: a file cannot be read.
    """
    if not given.get("resume"):
        return dict(given)
    return {**saved_options(kind, Path(given.get("out", kind.out))), **given}


def saved_options(kind: type[Setting], out: Path) -> dict[str, Any]:
    """The options of the run in ``out``, less those of `NOT_IN_CARD`.

    Raises:
        ValueError: there is no run to go on with, or a file of it is damaged.
        OSError: a file cannot be read.
    """
    if not (out / "checkpoint").is_file():
        raise ValueError(f"{out} has no checkpoint to go on from: leave --resume out")
    training = load_agent(out / "last").card.get("training")
    if not isinstance(training, dict):
        raise ValueError(f"{out / 'last.json'}: training must be a map of options")
    return {field.name: training[field.name] for field in fields(kind) if field.name in training}


def check_same(args: Setting) -> None:
    """Refuse to go on as another experiment.

    Raises:
        ValueError: an option differs from that of the run in ``args.out``, or there is none.
        OSError: a file cannot be read.
    """
    saved = saved_options(type(args), Path(args.out))
    differ = [n for n in saved if n not in MAY_CHANGE and getattr(args, n) != saved[n]]
    if differ:
        was = ", ".join(f"{name}={saved[name]}" for name in differ)
        now = ", ".join(str(getattr(args, name)) for name in differ)
        raise ValueError(f"{args.out} was trained with {was}, got {now}")
