"""A system: GPU, link and far memory, the stored bitwidths and how a far expert is served."""

from dataclasses import dataclass
from typing import Literal

from ndp_gym.specs.checks import require_non_negative
from ndp_gym.specs.devices import FarSpec, GpuSpec, LinkSpec
from ndp_gym.specs.formats import Format


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Copies on demand that a predictor has seen coming.

    Attributes:
        depth: layers ahead, i.e. how much GPU time the copy can hide behind, in layers.
        recall: share of the copies needed that were predicted.
        precision: share of the copies predicted that are needed; the rest use the link in vain.
    """

    depth: int = 1
    recall: float
    precision: float = 1.0

    def __post_init__(self) -> None:
        """Check the three numbers."""
        if self.depth < 1:
            raise ValueError(f"prefetch depth must be >= 1 layer, got {self.depth}")
        if not 0 <= self.recall <= 1:
            raise ValueError(f"prefetch recall must be in [0, 1], got {self.recall}")
        if not 0 < self.precision <= 1:
            raise ValueError(f"prefetch precision must be in (0, 1], got {self.precision}")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What happens to an expert that is needed but not in HBM.

    ``in_place``: activations travel and the far device computes. ``fetch``: the weights travel;
    HBM that the placement does not pin is a cache run by ``cache``, per layer or over all layers.
    ``balance``: the busiest experts' weights travel for one step, the far device computes the rest,
    in the split that makes the slower side fastest (MoNDE, arXiv 2405.18832).

    Attributes:
        kind: one of the three.
        cache: rule of the cache (``fetch`` only).
        scope: one cache over all layers, or one per layer.
        credit: ``balance`` only: copies per expert outside HBM, saved up, not the best split.
        rank_bits: ``fetch`` only: width fetched by router rank (the widest that a token of the step
            asks for, the last entry for all further ranks) in place of the plan's; a wider cached
            copy serves too (HOBBIT, arXiv 2411.01433).
        prefetch: ``fetch`` only: predicted copies hide behind earlier layers.
    """

    kind: Literal["in_place", "fetch", "balance"]
    cache: Literal["none", "lru", "lfu", "fifo"] = "none"
    scope: Literal["layer", "global"] = "global"
    credit: float | None = None
    rank_bits: tuple[int, ...] = ()
    prefetch: Prefetch | None = None

    def __post_init__(self) -> None:
        """Check the names, and that each option belongs to its kind."""
        rules = {
            "kind": ("in_place", "fetch", "balance"),
            "cache": ("none", "lru", "lfu", "fifo"),
            "scope": ("layer", "global"),
        }
        for field, allowed in rules.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"service {field} must be one of {allowed}, got {value!r}")
        if self.kind != "fetch" and self.cache != "none":
            raise ValueError(f"service {self.kind} keeps no cache, got cache={self.cache!r}")
        if self.kind != "fetch" and (self.rank_bits or self.prefetch is not None):
            raise ValueError(f"rank_bits and prefetch need service 'fetch', got {self.kind!r}")
        if self.credit is not None and (self.kind != "balance" or self.credit < 0):
            raise ValueError(
                f"credit must be >= 0 and needs service 'balance', got {self.credit} for "
                f"{self.kind!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """A GPU with HBM, a far memory behind a link, and the widths stored there.

    ``overlap`` is the share of the shorter of GPU and far time that is hidden (1: parallel, 0:
    serial). ``engine_base_s + engine_token_s * tokens`` is the serving engine's own time per
    decode step. ``stored_bits`` lists the replicas, widest first; with ``requantise`` only the
    widest is stored and narrower ones are made on the far device, which is charged.

    Raises:
        ValueError: if a share or time is out of range, or a stored width is unknown to the format
            or to the GPU's kernels.
    """

    name: str
    gpu: GpuSpec
    link: LinkSpec
    far: FarSpec
    overlap: float = 1.0
    engine_base_s: float = 0.0
    engine_token_s: float = 0.0
    reserve_bytes: int = 0
    stored_bits: tuple[int, ...]
    format: Format
    requantise: bool = False
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check overlap and times, then every stored width against format and GPU."""
        owner = f"system {self.name!r}"
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"{owner}: overlap must be in [0, 1], got {self.overlap}")
        require_non_negative(
            owner,
            engine_base_s=self.engine_base_s,
            engine_token_s=self.engine_token_s,
            reserve_bytes=self.reserve_bytes,
        )
        bits = self.stored_bits
        if not bits or list(bits) != sorted(set(bits), reverse=True):
            raise ValueError(f"{owner}: stored_bits must be distinct and descending, got {bits}")
        for width in bits:
            if width not in self.format.bits_per_weight:
                raise ValueError(
                    f"{owner}: stored_bits must be bitwidths of format {self.format.name!r} "
                    f"({sorted(self.format.bits_per_weight)}), got {width}"
                )
            kernel = self.format.kernel[width]
            if kernel not in self.gpu.moe_kernels:
                raise ValueError(
                    f"{owner}: gpu {self.gpu.name!r} must have the MoE kernel of {width} bit, "
                    f"one of {sorted(self.gpu.moe_kernels)}, got {kernel!r}"
                )
        if self.requantise and not self.far.can_compute:
            raise ValueError(f"{owner}: requantise needs a far device that computes")

    @property
    def default_service(self) -> Service:
        """``in_place`` where the far device computes, else ``fetch`` without a cache."""
        return Service(kind="in_place" if self.far.can_compute else "fetch")
