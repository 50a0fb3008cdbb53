"""From the error of the copies that served to the loss of the model.

Relative weight error -> share of gate energy -> layer sensitivity -> ΔNLL in nats per token
(``docs/model.md`` section 6). Perplexity and accuracy follow from ΔNLL; accuracy points
are a labelled estimate. Nothing is clamped: above :data:`VALID_DELTA_NLL` a result is outside the
range that was fitted and has to be flagged by who reports it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ndp_gym.specs import MoESpec, SystemSpec

VALID_DELTA_NLL = 1.5
"""Nats above which the linear form was never seen to hold."""

SUPER_EXPERT_NATS = 0.8
"""Nats lost when every super expert is served at 2 bit or less (a guess)."""

ACCURACY_POINTS_PER_NAT = 19.0
"""Zero-shot accuracy points lost per nat (8-task mean of Mixtral, arXiv 2410.06270, R2 .97)."""

ACCURACY_HEADROOM = 37.5
"""Points between full precision (71.3) and chance (33.8) of that mean."""


@dataclass(frozen=True, eq=False)
class QualityModel:
    """How relative error becomes nats.

    ``kappa`` is the loss in nats at relative error 1 (3.0 with ``mse_g128``, plausible 2-5; other
    formats in ``docs/model.md`` section 6). ``table`` is a measured relative error per copy,
    [L, E, NB] in the order of ``system.stored_bits``; it replaces the format's numbers.

    Two models are equal if they have the same ``kappa`` and the same table object.

    Raises:
        ValueError: if ``kappa`` is not positive and finite, or the table is not a finite,
            non-negative 3-d array.
    """

    kappa: float = 3.0
    table: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Check ``kappa`` and the table's numbers (its shape is checked against a model later)."""
        if not (np.isfinite(self.kappa) and self.kappa > 0):
            raise ValueError(f"kappa must be finite and > 0, got {self.kappa}")
        if self.table is not None:
            if self.table.ndim != 3:
                raise ValueError(f"table must have 3 axes [L, E, NB], got {self.table.shape}")
            if not (np.isfinite(self.table).all() and (self.table >= 0).all()):
                raise ValueError("table must hold finite relative errors >= 0")

    def __eq__(self, other: object) -> bool:
        """Same ``kappa`` and the same table object."""
        if not isinstance(other, QualityModel):
            return NotImplemented
        return self.kappa == other.kappa and self.table is other.table

    def __hash__(self) -> int:
        """Consistent with equality, so that results can be cached by quality model."""
        return hash((self.kappa, id(self.table)))


def rel_mse_table(
    model: MoESpec, system: SystemSpec, quality: QualityModel | None = None
) -> npt.NDArray[np.float64]:
    """Relative squared error of every stored copy, [L, E, NB], in the order of ``stored_bits``.

    Raises:
        ValueError: if the quality model's measured table has another shape.
    """
    shape = (model.n_layers, model.n_experts, len(system.stored_bits))
    if quality is not None and quality.table is not None:
        if quality.table.shape != shape:
            raise ValueError(
                f"table must have shape [L, E, NB] = {shape}, got {quality.table.shape}"
            )
        return np.array(quality.table, dtype=np.float64)
    errors = np.array([system.format.rel_mse[bits] for bits in system.stored_bits])
    return np.broadcast_to(errors, shape).copy()


@lru_cache(maxsize=64)
def layer_weights(model: MoESpec) -> npt.NDArray[np.float64]:
    """Sensitivity of each routed layer, [L], summing to 1; read-only.

    Default: weight 2 for the first four and the last two layers, else 1 (set by hand for five
    perplexities of Mixtral, 32 layers); ``model.layer_weights`` replaces it.
    """
    if model.layer_weights is not None:
        weights = np.array(model.layer_weights, dtype=np.float64)
    else:
        weights = np.ones(model.n_layers)
        weights[:4] = 2.0
        weights[-2:] = 2.0
    weights = np.asarray(weights / weights.sum(), dtype=np.float64)
    weights.flags.writeable = False
    return weights


def delta_nll(
    model: MoESpec,
    error: npt.ArrayLike,
    energy: npt.ArrayLike,
    super_low_share: npt.ArrayLike = 0.0,
    quality: QualityModel | None = None,
) -> npt.NDArray[np.float64]:
    """Loss in nats per token: ``kappa * sum_l a_l * error_l / energy_l`` plus the guard.

    Args:
        model: supplies the layer weights ``a``.
        error: sum over served tokens of gate energy x relative error, [..., L].
        energy: sum over served tokens of gate energy (squared gate weight), [..., L]; a layer
            without energy loses nothing.
        super_low_share: share of the super experts' work served at 2 bit or less, [...]; costs
            up to :data:`SUPER_EXPERT_NATS`.
        quality: the error model; default :class:`QualityModel`.

    Returns:
        [...] nats; not clamped.
    """
    err = np.asarray(error, dtype=np.float64)
    total = np.asarray(energy, dtype=np.float64)
    relative = err / np.where(total > 0, total, np.inf)
    return nats_of((relative * layer_weights(model)).sum(axis=-1), super_low_share, quality)


def nats_of(
    relative_error: npt.ArrayLike,
    super_low_share: npt.ArrayLike = 0.0,
    quality: QualityModel | None = None,
) -> npt.NDArray[np.float64]:
    """Loss in nats per token for a relative error averaged over layers, plus the guard."""
    kappa = (quality or QualityModel()).kappa
    guard = SUPER_EXPERT_NATS * np.asarray(super_low_share, dtype=np.float64)
    loss = kappa * np.asarray(relative_error, dtype=np.float64)
    return np.asarray(loss + guard, dtype=np.float64)


def perplexity(ppl: float, delta_nll_nats: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Perplexity of a model of perplexity ``ppl`` after losing ``delta_nll_nats``."""
    return ppl * np.exp(np.asarray(delta_nll_nats, dtype=np.float64))


def accuracy_drop_points(delta_nll_nats: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Estimated loss of zero-shot accuracy in points: 19 per nat, down to chance level.

    Fitted on 8-task means of Mixtral-8x7B (largest error 2.5 points); means that contain maths and
    code lose 35-50 points per nat instead.
    """
    points = ACCURACY_POINTS_PER_NAT * np.asarray(delta_nll_nats, dtype=np.float64)
    return np.minimum(points, ACCURACY_HEADROOM)
