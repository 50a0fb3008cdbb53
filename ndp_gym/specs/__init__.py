"""What is simulated: frozen, validated descriptions of formats, models, devices and systems.

Nothing here knows time, traces or Gymnasium. Sizes are in bytes, rates in bytes (or FLOP) per
second, times in seconds. ``dataclasses.replace`` changes one number and validates again.
"""

from ndp_gym.specs.devices import FarSpec, GpuSpec, LinkSpec, MoEKernel
from ndp_gym.specs.formats import Format
from ndp_gym.specs.model import GQA, MLA, MoESpec
from ndp_gym.specs.system import Prefetch, Service, SystemSpec

__all__ = [
    "GQA",
    "MLA",
    "FarSpec",
    "Format",
    "GpuSpec",
    "LinkSpec",
    "MoEKernel",
    "MoESpec",
    "Prefetch",
    "Service",
    "SystemSpec",
]
