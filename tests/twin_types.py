"""Words of the kernel's slow twin: an expert is a key ``(layer, expert)``, 0 bits = no copy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ndp_gym.cost import CostTable

Key = tuple[int, int]


@dataclass(kw_only=True)
class Cached:
    """One on-demand copy in HBM: its width, tick of its last use (FIFO: of insertion), its uses."""

    bits: int
    time: int
    uses: int


@dataclass(kw_only=True)
class TwinState:
    """What survives a window; ``bits`` dicts hold every key."""

    hbm: dict[Key, int]
    far: dict[Key, int]
    target: dict[Key, int]
    made: dict[Key, int]
    queue: list[Key]
    head_bytes: int
    cache: dict[Key, Cached]
    tick: int
    credit: float
    load: dict[Key, float]
    fresh: bool


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Everything that does not change during an episode."""

    cost: CostTable
    n_layers: int
    n_experts: int
    rel_mse: Sequence[Sequence[Sequence[float]]]
    requantise_s: Sequence[float]
    far_computes: bool
    layer_weights: Sequence[float]
    kappa: float
    super_experts: Sequence[Key]

    @property
    def keys(self) -> list[Key]:
        """Every expert in code order, layer * n_experts + expert."""
        return [(layer, e) for layer in range(self.n_layers) for e in range(self.n_experts)]

    def index(self, bits: int) -> int:
        """Position of a stored width in the tables of the cost."""
        return int(self.cost.index_of[bits])

    def weight_bytes(self, bits: int) -> int:
        """W(b), and 0 where there is no copy."""
        return int(self.cost.weight_bytes[self.index(bits)]) if bits else 0


@dataclass(frozen=True, kw_only=True)
class TwinPlan:
    """One plan: tier and bits of every expert, its priority, and what happens on a miss."""

    tier: dict[Key, int]
    bits: dict[Key, int]
    order: dict[Key, float] | None
    kind: str
    cache: str
    scope: str
    credit: float | None = None
    rank_bits: tuple[int, ...] = ()
    depth: int = 0  # no prefetch
    recall: float = 0.0
    precision: float = 1.0


@dataclass(kw_only=True)
class Totals:
    """Sums over one window; lists over layers or steps; ``events`` says what the window covered."""

    decode_s: float = 0.0
    load_s: float = 0.0
    requantise_s: float = 0.0
    tokens: int = 0
    routed: int = 0
    hits: int = 0
    hbm_weight_bytes: int = 0
    far_weight_bytes: int = 0
    activation_bytes: int = 0
    fetch_bytes: int = 0
    migration_bytes: int = 0
    wasted_bytes: int = 0
    load_bytes: int = 0
    n_repaired: int = 0
    step_s: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    layer_s: list[float] = field(default_factory=list)
    gpu_s: list[float] = field(default_factory=list)
    far_s: list[float] = field(default_factory=list)
    link_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    layer_hits: list[int] = field(default_factory=list)
    layer_routed: list[int] = field(default_factory=list)
    layer_error: list[float] = field(default_factory=list)
    layer_energy: list[float] = field(default_factory=list)
    counts: dict[Key, int] = field(default_factory=dict)
    gate_energy: dict[Key, float] = field(default_factory=dict)
    low_tokens: dict[Key, int] = field(default_factory=dict)
    served_tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    delta_nll: float = 0.0
    events: Counter[str] = field(default_factory=Counter)


def empty_totals(rules: Rules) -> Totals:
    """Totals of a window in which nothing happened yet."""
    zeros = [0.0] * rules.n_layers
    return Totals(
        layer_s=list(zeros),
        gpu_s=list(zeros),
        far_s=list(zeros),
        link_s=list(zeros),
        stall_s=list(zeros),
        layer_error=list(zeros),
        layer_energy=list(zeros),
        layer_hits=[0] * rules.n_layers,
        layer_routed=[0] * rules.n_layers,
        counts=dict.fromkeys(rules.keys, 0),
        gate_energy=dict.fromkeys(rules.keys, 0.0),
        low_tokens=dict.fromkeys(rules.keys, 0),
        served_tokens={(tier, i): 0 for tier in (0, 1) for i in range(len(rules.cost.bits))},
    )


@dataclass(kw_only=True)
class Routed:
    """Tokens and gate energy of the active experts of a layer, in order of first appearance."""

    tokens: dict[Key, int] = field(default_factory=dict)
    energy: dict[Key, float] = field(default_factory=dict)


class Token(NamedTuple):
    """One live slot in one decode step: context S_j; per layer its experts and gates by rank."""

    context: int
    experts: list[list[int]]
    gates: list[list[float]]
