"""Calibrated constants fitted without one source, and what they then say about that source.

A calibrated row shows only that a form is adequate; how it does on a source that had no part in the
fit is evidence. Where all rows come from one publication, its parts take the place of sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym import presets
from ndp_gym.quality import QualityModel
from ndp_gym.units import MS
from ndp_gym.validation import cpu_offload, in_hbm, quality, seed, sweep
from ndp_gym.validation.recordings import MissingRecordingError, Recordings
from ndp_gym.validation.targets import target


class Fold(NamedTuple):
    """One source left out.

    Attributes:
        constants: Names of what was fitted.
        left_out: The source that had no part in the fit.
        fitted: Values without it, in the units of the name.
        default: Values in use.
        ratios: Ours over published of the left-out rows; empty where errors are residuals.
        rmse: Residual error of the left-out rows where a ratio says nothing.
    """

    constants: str
    left_out: str
    fitted: tuple[float, ...]
    default: tuple[float, ...]
    ratios: tuple[float, ...] = ()
    rmse: float | None = None

    @property
    def worst(self) -> float | None:
        """The ratio farthest from 1."""
        return max(self.ratios, key=lambda r: abs(math.log(r)), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The fold as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._asdict().items()}


def folds(recordings: Recordings) -> list[Fold]:
    """All folds; those of the seed are left out where its recording is missing."""
    try:
        found = list(_seed_folds(recordings))
    except MissingRecordingError:
        found = []
    parts = (
        *(_engine_folds, _kernel_folds, _offload_folds, _floor_folds),
        *(_kappa_folds, _output_kappa_folds),
    )
    return [*found, *(fold for part in parts for fold in part())]


def _ratios(ours: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(value / target(name).published for name, value in ours.items())


def _squared_logs(ours: Mapping[str, float]) -> float:
    return sum(math.log(ratio) ** 2 for ratio in _ratios(ours))


def _seed_folds(recordings: Recordings) -> Iterator[Fold]:
    """``eta_n`` and ``pi`` from the ratios of the text alone, and from the bars of Fig. 6 alone.

    The ratios constrain little more than the product of both, so that fit is loose.
    """
    grid: dict[tuple[float, float], dict[str, float]] = {}
    coarse = (np.arange(0.10, 0.51, 0.04), np.arange(0.15, 0.76, 0.04))
    for left_out, prefix in (("ratios of section 5.2", "decode-ratio/"), ("Fig. 6", "tokens")):

        def error(at: tuple[float, float], prefix: str = prefix) -> float:
            return _squared_logs(_split(grid[at], prefix, inside=False))

        _fill(grid, recordings, *coarse)
        eta, pi = min(grid, key=error)
        near = np.arange(-0.03, 0.035, 0.01)
        _fill(grid, recordings, eta + near, pi + near)
        best = min(grid, key=error)
        ours = _split(grid[best], prefix, inside=True)
        yield Fold("eta_n, pi of seed_sim", left_out, best, tuple(seed.FITTED), _ratios(ours))


def _fill(
    grid: dict[tuple[float, float], dict[str, float]],
    recordings: Recordings,
    efficiencies: npt.NDArray[np.float64],
    migrations: npt.NDArray[np.float64],
) -> None:
    """Add the seed's calibrated rows at all pairs (``eta_n``, ``pi``), both to two digits."""
    for pi in migrations.round(2).tolist():
        wanted = [eta for eta in efficiencies.round(2).tolist() if (eta, pi) not in grid]
        if wanted:
            constants = seed.FITTED._replace(migrations=pi)
            cases = {size: seed.seed(recordings, size, constants) for size in seed.RESIDENT}
        for eta in wanted:
            moved = {size: case.with_far_efficiency(eta) for size, case in cases.items()}
            grid[eta, pi] = seed.fitted_rows(moved)


def _split(rows: Mapping[str, float], prefix: str, *, inside: bool) -> dict[str, float]:
    start = f"seed/{prefix}"
    return {name: value for name, value in rows.items() if name.startswith(start) == inside}


def _engine_folds() -> Iterator[Fold]:
    """``a0`` and ``a1`` from the rows of one GPU, predicting the other."""
    default = presets.system("h100_mxfp4")
    in_use = (default.engine_base_s / MS, default.engine_token_s / MS)
    for gpu in ("h100", "b200"):
        kept = [(s, b) for s in in_hbm.CALIBRATED for b in s.batches if s.gpu != gpu]
        measured = np.array([target(s.target(b)).published for s, b in kept])
        bare = np.array([s.step_without_engine_s(b) / MS for s, b in kept])
        terms = np.array([[1.0, b] for _, b in kept]) / measured[:, None]
        fitted, *_ = np.linalg.lstsq(terms, 1 - bare / measured, rcond=None)
        ours = {
            s.target(b): s.step_without_engine_s(b) / MS + float(fitted @ [1.0, b])
            for s in in_hbm.CALIBRATED
            for b in s.batches
            if s.gpu == gpu
        }
        name = "a0 (ms), a1 (ms/token) of the engine"
        yield Fold(name, f"rows on {gpu}", tuple(fitted.tolist()), in_use, _ratios(ours))


def _kernel_folds() -> Iterator[Fold]:
    """Launch time and time per expert from three of the four kernel rows of the one source."""
    one, two = (in_hbm.kernel_us(n) for n in (1, 2))
    in_use = (2 * one - two, two - one)
    for left_out in in_hbm.KERNEL_EXPERTS:
        kept = [n for n in in_hbm.KERNEL_EXPERTS if n != left_out]
        measured = np.array([target(in_hbm.kernel_target(n)).published for n in kept])
        terms = np.array([[1.0, n] for n in kept]) / measured[:, None]
        fitted, *_ = np.linalg.lstsq(terms, np.ones(len(kept)), rcond=None)
        ours = {in_hbm.kernel_target(left_out): float(fitted @ [1.0, left_out])}
        name = "launch (us), per expert (us) of rtxpro6000"
        yield Fold(name, f"{left_out} experts", tuple(fitted.tolist()), in_use, _ratios(ours))


def _offload_folds() -> Iterator[Fold]:
    """``eta_n`` of the CPUs without one of the three sources of calibrated rows."""
    calibrated = [name for name in cpu_offload.CASES if target(name).kind == "calibrated"]
    for source in dict.fromkeys(target(name).source for name in calibrated):
        kept = [name for name in calibrated if target(name).source != source]
        errors = {eta: _squared_logs(_offload(kept, eta)) for eta in _grid(0.25, 0.50, 0.005)}
        best = min(errors, key=errors.__getitem__)
        ours = _offload([n for n in cpu_offload.CASES if target(n).source == source], best)
        default = presets.far("cpu_xeon_6454s").efficiency
        yield Fold("eta_n of CPUs", source, (best,), (default,), _ratios(ours))


def _offload(names: Sequence[str], efficiency: float) -> dict[str, float]:
    return {name: cpu_offload.CASES[name].tokens_per_s(efficiency) for name in names}


def _floor_folds() -> Iterator[Fold]:
    """The floor ``f`` without one policy of the sweep; the skews of the routing stay."""
    for left_out in sweep.POLICIES:
        kept = [policy for policy in sweep.POLICIES if policy != left_out]
        errors = {f: sum(sweep.rmse(p, f) ** 2 for p in kept) for f in _grid(0.0, 0.70, 0.01)}
        best = min(errors, key=errors.__getitem__)
        error = sweep.rmse(left_out, best)
        yield Fold("f of the sweep", left_out, (best,), (sweep.FLOOR,), rmse=error)


def _kappa_folds() -> Iterator[Fold]:
    """``kappa`` from the points of one method, predicting those of the other."""
    fmt = presets.fmt(quality.DEFAULT_FORMAT)
    for method in ("pmq", "gemq"):
        kept = [name for name in quality.MIXED if not name.startswith(method)]
        error = np.array([quality.MIXED[name].error(fmt) for name in kept])
        lost = np.array([quality.published_loss(name) for name in kept])
        kappa = float(error @ lost / (error @ error))
        ours = {
            f"quality/mixtral-ppl/{name}": quality.mixed_ppl(name, kappa)
            for name in quality.MIXED
            if name not in kept
        }
        name = "kappa of mse_g128"
        yield Fold(name, method.upper(), (kappa,), (QualityModel().kappa,), _ratios(ours))


def _output_kappa_folds() -> Iterator[Fold]:
    """``kappa`` of a measured output error without one bitwidth of the one source."""
    for left_out in quality.DEEPSEEK_ERROR:
        kept = [bits for bits in quality.DEEPSEEK_ERROR if bits != left_out]
        error = np.array([quality.DEEPSEEK_ERROR[bits] ** 2 for bits in kept])
        published = np.array([target(quality.deepseek_target(bits)).published for bits in kept])
        lost = np.log(published / quality.DEEPSEEK_MOE_PPL)
        kappa = float(error @ lost / (error @ error))
        ours = {quality.deepseek_target(left_out): quality.deepseek_ppl(left_out, kappa)}
        name, default = "kappa of a measured error", (quality.KAPPA_RTN_OUTPUT,)
        yield Fold(name, f"{left_out} bit", (kappa,), default, _ratios(ours))


def _grid(low: float, high: float, step: float) -> list[float]:
    """``low`` to ``high``, both included."""
    return [round(low + step * i, 6) for i in range(round((high - low) / step) + 1)]
