"""Weight formats: what a nominal bitwidth costs in storage and in error."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ndp_gym.specs.checks import require_non_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class Format:
    """Stored width, relative error and GPU kernel of each nominal bitwidth.

    ``bits_per_weight[b]`` includes group scales and zero points. ``rel_mse[b]`` is
    ``||W^ - W||^2 / ||W||^2`` of one matrix (``gptq_g128``: relative *output* error).
    ``kernel[b]`` names the grouped MoE kernel that reads the width, a key of
    :attr:`GpuSpec.moe_kernels`.

    Raises:
        ValueError: if the three tables differ in their bitwidths, a bitwidth is outside 1..16 or
            a number is out of range.
    """

    name: str
    bits_per_weight: Mapping[int, float] = field(hash=False)
    rel_mse: Mapping[int, float] = field(hash=False)
    kernel: Mapping[int, str] = field(hash=False)
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the three tables describe the same bitwidths with sane numbers."""
        widths = set(self.bits_per_weight)
        owner = f"format {self.name!r}"
        if not widths:
            raise ValueError(f"{owner}: bits_per_weight must name at least one bitwidth")
        for table in ("rel_mse", "kernel"):
            if set(getattr(self, table)) != widths:
                raise ValueError(
                    f"{owner}: {table} must cover the bitwidths {sorted(widths)}, "
                    f"got {sorted(getattr(self, table))}"
                )
        for bits in widths:
            if not 1 <= bits <= 16:
                raise ValueError(f"{owner}: bitwidths must be in 1..16, got {bits}")
            require_positive(owner, **{f"bits_per_weight[{bits}]": self.bits_per_weight[bits]})
            require_non_negative(owner, **{f"rel_mse[{bits}]": self.rel_mse[bits]})
