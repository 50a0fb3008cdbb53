"""What a user may hand in for a recording, a model or a system, and the objects it stands for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ndp_gym import presets
from ndp_gym.quality import QualityModel
from ndp_gym.quality_file import QualityFile
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.trace import RoutingTrace

__all__ = [
    "DEFAULT_SYSTEM",
    "Inputs",
    "ModelLike",
    "QualityLike",
    "SystemLike",
    "TraceLike",
    "bundled_trace_path",
    "check_integer",
    "combinations",
    "distinct_integers",
    "find_model",
    "find_quality",
    "find_system",
    "open_trace",
    "trace_argument",
]

DEFAULT_SYSTEM = "h100_cxl_seed_ndp"
_BUNDLED = "minimoe.safetensors"

TraceLike = str | os.PathLike[str] | RoutingTrace | None
ModelLike = str | MoESpec | None
SystemLike = str | SystemSpec | None
QualityLike = str | os.PathLike[str] | QualityModel | None
_Spec = TypeVar("_Spec", MoESpec, SystemSpec)


class Inputs(NamedTuple):
    """One combination to evaluate; ``label`` names the recording in results."""

    label: str
    trace: RoutingTrace
    model: MoESpec
    system: SystemSpec


def bundled_trace_path() -> Path:
    """The recording that ships with the package, or lies in the checkout's ``traces``.

    Raises:
        FileNotFoundError: there is none.
    """
    package = Path(__file__).resolve().parent
    for path in (package / "data" / _BUNDLED, package.parent / "traces" / _BUNDLED):
        if path.is_file():
            return path
    raise FileNotFoundError(2, "the bundled recording is missing; name a trace", _BUNDLED)


def open_trace(trace: TraceLike = None) -> RoutingTrace:
    """The recording behind a path; ``None`` is the bundled one."""
    if isinstance(trace, RoutingTrace):
        return trace
    return RoutingTrace.open(bundled_trace_path() if trace is None else trace)


def trace_argument(trace: RoutingTrace) -> str | None:
    """What ``gym.make(..., trace=...)`` takes for ``trace``: ``None`` for the bundled recording.

    A recording in memory has no such argument; its name is returned, which opens nothing.
    """
    if trace.path is not None and trace.path.name == _BUNDLED:
        try:
            bundled = bundled_trace_path()
        except FileNotFoundError:
            bundled = None
        if bundled == trace.path.resolve():
            return None
    return trace.name


def find_model(model: ModelLike, trace: RoutingTrace) -> MoESpec:
    """The model behind a preset name; ``None`` is the one the recording names.

    Raises:
        ValueError: unknown name, or the recording names no preset.
    """
    if isinstance(model, MoESpec):
        return model
    name = model or trace.metadata.preset
    if name is None:
        raise ValueError(f"{trace.name}: names no model preset, so a model must be given")
    return presets.model(name)


def find_system(system: SystemLike = None) -> SystemSpec:
    """The system behind a preset name; ``None`` is the default one."""
    return system if isinstance(system, SystemSpec) else presets.system(system or DEFAULT_SYSTEM)


def find_quality(quality: QualityLike, model: MoESpec, system: SystemSpec) -> QualityModel:
    """The error model behind a file of measured errors; ``None`` is the default one.

    Raises:
        ValueError: not such a file, or one of another model or at other widths.
        OSError: the file cannot be read.
    """
    if quality is None or isinstance(quality, QualityModel):
        return quality or QualityModel()
    try:
        return QualityFile.open(quality).model_for(model, system)
    except ValueError as error:
        text, path = str(error), os.fspath(quality)
        raise ValueError(text if text.startswith(path) else f"{path}: {text}") from None


def combinations(
    traces: TraceLike | Sequence[TraceLike],
    models: ModelLike | Sequence[ModelLike],
    systems: SystemLike | Sequence[SystemLike],
) -> Iterator[Inputs]:
    """Every recording with every model it agrees with, on every system.

    Raises:
        ValueError: a recording without an agreeing model, two specs or files of one name.
    """
    opened = [open_trace(t) for t in _several(traces)]
    found_systems = _distinct("systems", [find_system(s) for s in _several(systems)])
    labels = _labels(opened)
    plans = [(label, t, _agreeing(t, models)) for label, t in zip(labels, opened, strict=True)]
    _distinct("models", [model for _, _, found in plans for model in found])
    for label, trace, agreeing in plans:
        for model in agreeing:
            for system in found_systems:
                yield Inputs(label, trace, model, system)


def _agreeing(trace: RoutingTrace, models: ModelLike | Sequence[ModelLike]) -> list[MoESpec]:
    """Models with the recording's layers, experts and top-k; the only one given is not filtered."""
    found = [find_model(m, trace) for m in _several(models)]
    shape = (trace.n_layers, trace.n_experts, trace.top_k)
    agree = [m for m in found if (m.n_layers, m.n_experts, m.top_k) == shape]
    if len(found) == 1 or agree:
        return agree or found
    raise ValueError(
        f"{trace.name} has n_layers, n_experts, top_k = {shape}, and none of the models "
        f"{', '.join(m.name for m in found)} has"
    )


def _labels(traces: Sequence[RoutingTrace]) -> list[str]:
    """File stems (or model names), and whole paths where stems repeat."""
    stems = [t.metadata.model if t.path is None else t.path.stem for t in traces]
    names = [
        stem if stems.count(stem) == 1 else trace.name
        for stem, trace in zip(stems, traces, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"traces must be distinct, got {', '.join(names)}")
    return names


def _distinct(what: str, specs: list[_Spec]) -> list[_Spec]:
    by_name: dict[str, _Spec] = {}
    for spec in specs:
        if by_name.setdefault(spec.name, spec) != spec:
            raise ValueError(f"{what} must have distinct names, got two different {spec.name!r}")
    return list(by_name.values())


def distinct_integers(name: str, values: Iterable[int], *, least: int) -> list[int]:
    """``values`` of the argument ``name`` as a list.

    Raises:
        ValueError: not several, none, not whole numbers, below ``least``, or one twice.
    """
    wanted = f"{name} must be a list of whole numbers >= {least}"
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{wanted}, got {values!r}")
    found = [check_integer(f"every one of {name}", value, least=least) for value in values]
    if not found:
        raise ValueError(f"{wanted}, at least one, got none")
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must be distinct, got {found}")
    return found


def check_integer(name: str, value: int, *, least: int) -> int:
    """``value`` of the argument ``name``.

    Raises:
        ValueError: not a whole number, or below ``least``.
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def _several(value: object) -> list:  # type: ignore[type-arg]
    """A list as it is, a single thing as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]
