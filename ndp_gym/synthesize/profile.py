"""What the routing of a model is like, as a dozen numbers a generator can draw from.

A token uses the K experts with the highest scores. The score of an expert is the sum of a
popularity (of the model, the domain, the conversation and the moment) and of a fluctuation of unit
variance: partly the token's hidden state seen through the expert's loadings, partly its own, both
with parts that fade fast, slowly and at once.
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
        popularity: Standard deviation over experts of the popularity, by layer from first to last;
            interpolated to other depths.
        model_share: Share of the popularity's variance that all domains have in common, 0..1.
        domain_share: Share that the conversations of a domain have in common, 0..1.
        drift_share: Share that wanders within a request, 0..1.
        prompt_share: Share that is one for the prompt and another for the answer, 0..1; what the
            four leave belongs to the conversation.
        cold: Weight of the popularity's tail of cold experts; that of its hot experts has 1.
        domain_spread: Standard deviation over domains of the log of the popularity's amplitude.
        fast: Share of the fluctuation that fades within ``fast_rows`` tokens, by layer, 0..1.
        slow: Share that fades within ``slow_rows`` tokens; what both leave is new for every token.
        coupling: Share of the fluctuation that comes from the hidden state, common to all layers,
            so that layers predict each other; the rest is every expert's own.
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
    coupling: float
    drift_share: float = 0.0
    prompt_share: float = 0.0
    fast_rows: float = 1.5
    slow_rows: float = 12.0
    drift_rows: float = 64.0
    cold: float = 0.0
    domain_spread: float = 0.0
    rank: int = 8
    gates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name, high in (("popularity", 100), ("fast", 1)):
            values = getattr(self, name)
            if not values or not all(0 <= value <= high for value in values):
                raise ValueError(
                    f"{name} must be numbers in 0..{high} by layer, got {values!r:.80}"
                )
        for name, high in (("slow", 1), ("coupling", 1), ("cold", 100), ("domain_spread", 10)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in 0..{high}, got {getattr(self, name)}")
        shares = (self.model_share, self.domain_share, self.drift_share, self.prompt_share)
        if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-9):
            raise ValueError(
                f"model_share, domain_share, drift_share and prompt_share must be >= 0 and sum to "
                f"at most 1, got {shares}"
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
