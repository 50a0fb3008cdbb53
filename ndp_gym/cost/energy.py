"""Joules per operation. Unvalidated: constants are literature values, no total was checked.

Sources in ``docs/model.md`` section 7. Static power dominates there: a published 0.65 J per token
against 0.10 J of HBM traffic, so rankings that leave ``static_energy_j`` out are wrong.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym.specs import FarSpec, GpuSpec, LinkSpec, MoESpec, SystemSpec


class EnergyParts(NamedTuple):
    """Joules by cause; ``total_j`` adds them up."""

    gpu_j: float
    far_j: float
    link_j: float
    static_j: float

    @property
    def total_j(self) -> float:
        """Joules of all causes."""
        return self.gpu_j + self.far_j + self.link_j + self.static_j


def gpu_energy_j(
    gpu: GpuSpec, n_bytes: npt.ArrayLike, n_flops: npt.ArrayLike = 0.0
) -> npt.NDArray[np.float64]:
    """Dynamic joules of HBM traffic and 16-bit FLOPs on the GPU."""
    traffic = np.asarray(n_bytes, dtype=np.float64) * gpu.j_per_byte
    return traffic + np.asarray(n_flops, dtype=np.float64) * gpu.j_per_flop


def far_energy_j(
    far: FarSpec, n_bytes: npt.ArrayLike, n_flops: npt.ArrayLike = 0.0
) -> npt.NDArray[np.float64]:
    """Dynamic joules of DRAM traffic and 16-bit FLOPs on the far device."""
    traffic = np.asarray(n_bytes, dtype=np.float64) * far.j_per_byte
    return traffic + np.asarray(n_flops, dtype=np.float64) * far.j_per_flop


def link_energy_j(link: LinkSpec, n_bytes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Joules of moving ``n_bytes`` over the link."""
    return np.asarray(n_bytes, dtype=np.float64) * link.j_per_byte


def static_energy_j(system: SystemSpec, seconds: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Joules drawn by GPU and far device for ``seconds``, whatever they do."""
    power_w = system.gpu.static_w + system.far.static_w
    return np.asarray(seconds, dtype=np.float64) * power_w


def dense_read_bytes(model: MoESpec) -> int:
    """HBM bytes of weights read in each decode step outside the routed experts, head included."""
    embedding = 0 if model.tied_embedding else model.vocab_size * model.hidden_size
    return round((model.dense_params - embedding) * model.dense_bits / 8)


def decode_energy(
    system: SystemSpec,
    *,
    seconds: float,
    hbm_bytes: float,
    far_bytes: float,
    link_bytes: float,
    gpu_flops: float = 0.0,
    far_flops: float = 0.0,
) -> EnergyParts:
    """Joules of a stretch of decoding, by cause.

    ``hbm_bytes`` should hold expert weights, :func:`dense_read_bytes` per step and KV reads;
    writes of migrated experts and far reads of copies are not charged anywhere in the model.
    """
    return EnergyParts(
        gpu_j=float(gpu_energy_j(system.gpu, hbm_bytes, gpu_flops)),
        far_j=float(far_energy_j(system.far, far_bytes, far_flops)),
        link_j=float(link_energy_j(system.link, link_bytes)),
        static_j=float(static_energy_j(system, seconds)),
    )
