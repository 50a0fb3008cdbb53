"""Options from a YAML file with the argument names of Stable-Baselines3's zoo.

``n_timesteps`` counts decode windows, ``n_envs`` copies of the environment, ``batch_size`` samples
of a gradient step; what belongs to the environment stands under ``env_kwargs``. Everything else
goes by the name of its option. All of it may stand under the id of an environment, which then says
what episodes draw their conditions from. Nothing in a file is evaluated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from ndp_gym import ENV_IDS

ZOO_NAMES = {"n_timesteps": "n_windows", "n_envs": "n_lanes", "batch_size": "minibatch"}
"""The zoo's name -> that of our option."""
GROUPS = ("env_kwargs", "policy_kwargs")
POLICY = "MlpPolicy"
"""The only ``policy`` of files for ``train.ppo``."""
PPO_ONLY = {
    "resume", "base", "init", "n_windows", "eval_every", "n_lanes", "own", "n_steps", "minibatch",
    "n_epochs", "learning_rate", "gamma", "gae_lambda", "hidden", "log_std_init", "wandb",
    "wandb_project",
}  # fmt: skip
"""Options of ``train.ppo`` that other scripts leave out of its files, even where theirs is named so
too; all but ``base``, which is the same everywhere."""


class Written(NamedTuple):
    """An option as the file has it."""

    name: str
    value: Any


def from_file(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    """Options of a YAML file under our names; ``hints`` are the types of all options.

    Scripts other than ``train.ppo`` take the setting alone from its files.

    Raises:
        ValueError: no map, a name that is no option, a value of another type, or an environment
            that is not ours or has other conditions.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a map of options, got {content!r}")
    env_id, content = _environment(path, content, hints)
    written = _flat(path, content)
    if content.get("policy") == POLICY or "policy" not in hints:
        policy = written.pop("policy", Written("policy", POLICY)).value
        if policy != POLICY:
            raise ValueError(f"{path}: policy must be {POLICY}, got {policy!r}")
        if "n_lanes" not in hints and content.get("policy") == POLICY:
            left_out = PPO_ONLY - ({"base"} & hints.keys())
            written = {ours: one for ours, one in written.items() if ours not in left_out}
    found = {}
    for ours, (name, value) in written.items():
        if ours not in hints:
            raise ValueError(f"{path}: no option {name!r}; options are {', '.join(hints)}")
        found[ours] = _of_type(f"{path}: {name}", hints[ours], value)
    if env_id is not None:
        drawn = found.setdefault("conditions", ENV_IDS[env_id].get("conditions", "fix"))
        if drawn != ENV_IDS[env_id].get("conditions", drawn):
            raise ValueError(
                f"{path}: conditions must be those of {env_id}, or be left out, got {drawn!r}"
            )
    return found


def _environment(
    path: Path, content: dict[str, Any], hints: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The id above all options, ``None`` where there is none, and the options."""
    known = {*GROUPS, *ZOO_NAMES, *hints}
    ids = [name for name, inner in content.items() if isinstance(inner, dict) and name not in known]
    if not ids:
        return None, content
    if len(content) > 1:
        names = ", ".join(map(str, content))
        raise ValueError(f"{path}: must be the options of one environment id alone, got {names}")
    (env_id,) = ids
    if env_id not in ENV_IDS:
        raise ValueError(
            f"{path}: environment id must be one of {', '.join(ENV_IDS)}, got {env_id!r}"
        )
    return env_id, content[env_id]


def _flat(path: Path, content: dict[str, Any]) -> dict[str, Written]:
    """Options by our names; the maps of `GROUPS` taken apart."""
    flat: dict[str, Written] = {}

    def add(ours: str, name: str, value: Any) -> None:
        if ours in flat:
            raise ValueError(f"{path}: {name} is given twice, also as {flat[ours].name}")
        flat[ours] = Written(name, value)

    for name, value in content.items():
        if name not in GROUPS:
            add(ZOO_NAMES.get(name, name), name, value)
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a map, got {value!r}")
        for inner, its_value in value.items():
            add(inner, f"{name}.{inner}", its_value)
    if "net_arch" in flat:
        name, widths = flat.pop("net_arch")
        if not (isinstance(widths, list) and len(widths) == 2 and widths[0] == widths[1]):
            raise ValueError(f"{path}: net_arch must be two equal widths, got {widths!r}")
        add("hidden", name, widths[0])
    rate = flat["learning_rate"].value if "learning_rate" in flat else None
    if isinstance(rate, str) and rate.startswith("lin_"):  # ours always falls linearly
        if _number(rate[4:]) is None:
            raise ValueError(f"{path}: learning_rate must be lin_<number>, got {rate!r}")
        flat["learning_rate"] = Written("learning_rate", rate[4:])
    return flat


def _of_type(name: str, hint: Any, value: Any) -> Any:
    """``value`` as the option's type; numbers may stand where the option is text."""
    words = [a for a in get_args(hint) if isinstance(a, str)]
    if words and value not in words:
        raise ValueError(f"{name} must be one of {words}, got {value!r}")
    if hint in (int, float):
        number = _number(value)
        is_whole = number is not None and math.isfinite(number) and int(number) == number
        if number is None or (hint is int and not is_whole):
            raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
        return hint(number)
    wanted = bool if hint is bool else str
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(value, wanted) or (wanted is str and is_number)):
        raise ValueError(f"{name} must be {wanted.__name__}, got {value!r}")
    return wanted(value)


def _number(value: Any) -> float | None:
    """What ``value`` is as a number, if it is one; YAML takes 1e5 and 3e-4 for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None
