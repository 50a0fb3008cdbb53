"""A system: GPU, link and far memory, the stored bitwidths and how a far expert is served."""

from dataclasses import dataclass
from typing import Literal

from ndp_gym.specs.checks import require_non_negative
from ndp_gym.specs.devices import FarSpec, GpuSpec, LinkSpec
from ndp_gym.specs.formats import Format


@dataclass(frozen=True, kw_only=True)
class Service:
    """What happens to an expert that is needed but not in HBM.

    ``in_place``: activations travel and the far device computes. ``fetch``: the weights travel;
    HBM that the placement does not pin is a cache run by ``cache``, per layer or over all layers.
    """

    kind: Literal["in_place", "fetch"]
    cache: Literal["none", "lru", "lfu", "fifo"] = "none"
    scope: Literal["layer", "global"] = "global"

    def __post_init__(self) -> None:
        """Check the three names; a cache needs ``fetch``."""
        rules = {
            "kind": ("in_place", "fetch"),
            "cache": ("none", "lru", "lfu", "fifo"),
            "scope": ("layer", "global"),
        }
        for field, allowed in rules.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"service {field} must be one of {allowed}, got {value!r}")
        if self.kind == "in_place" and self.cache != "none":
            raise ValueError(f"service in_place keeps no cache, got cache={self.cache!r}")


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
