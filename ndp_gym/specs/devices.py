"""The three devices of a system: GPU with HBM, link, far memory (which may compute)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ndp_gym.specs.checks import require_non_negative, require_positive, require_share


class MoEKernel(NamedTuple):
    """A grouped expert kernel: ``launch_s + bytes / (efficiency * bandwidth)``."""

    launch_s: float
    efficiency: float


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """A GPU: datasheet peaks, measured efficiencies and launch costs.

    ``static_w`` is the power drawn while decoding that does not depend on traffic;
    ``j_per_byte`` is HBM energy, ``j_per_flop`` that of a 16-bit FLOP.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    moe_kernels: Mapping[str, MoEKernel] = field(hash=False)
    dense_efficiency: float
    kv_efficiency: float
    compute_efficiency: float
    attention_launch_s: float
    gemm_launch_s: float
    elementwise_s: float
    static_w: float = 0.0
    j_per_byte: float = 0.0
    j_per_flop: float = 0.0
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check peaks, shares in (0, 1] and non-negative launch times and energies."""
        owner = f"gpu {self.name!r}"
        require_positive(
            owner,
            memory_bytes=self.memory_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            flops_per_s=self.flops_per_s,
        )
        require_share(
            owner,
            dense_efficiency=self.dense_efficiency,
            kv_efficiency=self.kv_efficiency,
            compute_efficiency=self.compute_efficiency,
        )
        require_non_negative(
            owner,
            attention_launch_s=self.attention_launch_s,
            gemm_launch_s=self.gemm_launch_s,
            elementwise_s=self.elementwise_s,
            static_w=self.static_w,
            j_per_byte=self.j_per_byte,
            j_per_flop=self.j_per_flop,
        )
        for kernel, (launch_s, efficiency) in self.moe_kernels.items():
            require_non_negative(owner, **{f"moe_kernels[{kernel}].launch_s": launch_s})
            require_share(owner, **{f"moe_kernels[{kernel}].efficiency": efficiency})

    @property
    def layer_launch_s(self) -> float:
        """Fixed time of one layer outside the experts: attention, four GEMMs, elementwise.

        The four are three of attention and the router (or a dense layer's MLP);
        ``t0`` of ``docs/model.md`` section 1.
        """
        return self.attention_launch_s + 4 * self.gemm_launch_s + self.elementwise_s


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """One link shared by both directions: usable bandwidth and one-way latency."""

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float
    j_per_byte: float = 0.0
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that bandwidth is positive, latency and energy not negative."""
        owner = f"link {self.name!r}"
        require_positive(owner, bandwidth_bytes_per_s=self.bandwidth_bytes_per_s)
        require_non_negative(owner, latency_s=self.latency_s, j_per_byte=self.j_per_byte)


@dataclass(frozen=True, kw_only=True)
class FarSpec:
    """The far memory: a CXL-NDP device, a CPU with its DRAM, or storage that cannot compute.

    ``compute_scaling`` says how compute time follows the bitwidth: ``"bits"`` proportionally
    (bit-serial), ``"dequant"`` not at all. ``min_tokens`` is the array height: fewer tokens cost
    as much as that many. ``floor_s`` is the least time a layer loses once one expert is far.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    efficiency: float
    flops_per_s: float = 0.0
    can_compute: bool
    compute_scaling: Literal["bits", "dequant"] = "dequant"
    min_tokens: int = 1
    floor_s: float = 0.0
    static_w: float = 0.0
    j_per_byte: float = 0.0
    j_per_flop: float = 0.0
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges; a device that computes needs a positive ``flops_per_s``."""
        owner = f"far device {self.name!r}"
        require_positive(
            owner,
            memory_bytes=self.memory_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            min_tokens=self.min_tokens,
        )
        require_share(owner, efficiency=self.efficiency)
        require_non_negative(
            owner,
            flops_per_s=self.flops_per_s,
            floor_s=self.floor_s,
            static_w=self.static_w,
            j_per_byte=self.j_per_byte,
            j_per_flop=self.j_per_flop,
        )
        if self.can_compute:
            require_positive(owner, flops_per_s=self.flops_per_s)
        if self.compute_scaling not in ("bits", "dequant"):
            raise ValueError(
                f"{owner}: compute_scaling must be 'bits' or 'dequant', "
                f"got {self.compute_scaling!r}"
            )
