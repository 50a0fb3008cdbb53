"""What the routing of a model is like, as a dozen numbers a generator can draw from.

A token uses the K experts with the highest scores. The score of an expert is the sum of a
popularity (of the model, the domain and the conversation), of the token's hidden state seen through
the expert's loadings, and of unit normal noise: every amplitude below is in units of that noise.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """Amplitudes of the parts of a score; standard deviations over experts, in units of the noise.

    Attributes:
        popularity: Of the popularity, by layer from first to last; interpolated to other depths.
        model_share: Share of the popularity's variance that all domains have in common, 0..1.
        domain_share: Share that the conversations of a domain have in common, 0..1.
        drift_share: Share that wanders within a request, 0..1; what the three leave belongs to the
            conversation.
        fast: Of the part of the hidden state that fades within ``fast_rows`` tokens, by layer.
        slow: Of the part that fades within ``slow_rows`` tokens.
        token: Of the part of the hidden state that is drawn anew for every token; as all parts it
            is common to all layers, so that layers predict each other.
        fast_rows: Time constant of the fast part, tokens.
        slow_rows: Time constant of the slow part, tokens.
        drift_rows: Time constant of the drifting popularity, tokens.
        rank: Dimensions of the hidden state.
        gates: Mean gate weight by rank, or None for a trace without gate weights.
    """

    popularity: tuple[float, ...]
    model_share: float
    domain_share: float
    fast: tuple[float, ...]
    slow: float
    token: float
    drift_share: float = 0.0
    fast_rows: float = 1.5
    slow_rows: float = 12.0
    drift_rows: float = 64.0
    rank: int = 8
    gates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("popularity", "fast"):
            values = getattr(self, name)
            if not values or not all(0 <= value <= 20 for value in values):
                raise ValueError(f"{name} must be numbers in 0..20 by layer, got {values!r:.80}")
        for name in ("slow", "token"):
            if not 0 <= getattr(self, name) <= 20:
                raise ValueError(f"{name} must be in 0..20, got {getattr(self, name)}")
        shares = (self.model_share, self.domain_share, self.drift_share)
        if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-9):
            raise ValueError(
                f"model_share, domain_share and drift_share must be >= 0 and sum to at most 1, "
                f"got {shares}"
            )
        for name in ("fast_rows", "slow_rows", "drift_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 1 <= self.rank <= 256:
            raise ValueError(f"rank must be in 1..256, got {self.rank}")

    def by_layer(self, name: str, n_layers: int) -> Floats:
        """``popularity`` or ``fast`` for ``n_layers`` layers ``[L]``."""
        values = getattr(self, name)
        knots = np.linspace(0, 1, len(values))
        return np.asarray(np.interp(np.linspace(0, 1, n_layers), knots, values))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def calibrated(name: str | None, n_experts: int, top_k: int) -> tuple[str, RoutingProfile]:
    """The calibration of a model preset, or the one whose E and K are nearest, and its name.

    Distance is in log E and log K/E: skew and locality change with both.
    """
    table = _table()
    if name not in table:
        shape = np.log([n_experts, top_k / n_experts])

        def distance(key: str) -> float:
            e, k = table[key]["n_experts"], table[key]["top_k"]
            return float(np.abs(np.log([e, k / e]) - shape).sum())

        name = min(table, key=distance)
    return name, profile_of(table[name])


def profile_of(row: Mapping[str, Any]) -> RoutingProfile:
    """The profile among the keys of a row; lists become tuples."""
    known = {field.name for field in fields(RoutingProfile)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in known
    }
    return RoutingProfile(**values)


def gates_for(gates: Sequence[float] | None, top_k: int) -> tuple[float, ...] | None:
    """The gate profile if it has ``top_k`` ranks, scaled to sum 1; None otherwise."""
    if gates is None or len(gates) != top_k:
        return None
    ordered = sorted(gates, reverse=True)
    return tuple(gate / sum(ordered) for gate in ordered)


@cache
def _table() -> dict[str, dict[str, Any]]:
    file = resources.files("ndp_gym.synthesize").joinpath("calibrated.toml")
    return tomllib.loads(file.read_text(encoding="utf-8"))
