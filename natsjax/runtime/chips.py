"""Accelerators by name: peak FLOP/s, memory and links."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one JAX device; a TPU7x chip is two devices.

    Attributes:
      name: as in a topology's name.
      memory: bytes that a program can have, as the TPUs' compiler reports; of a GPU all that it has.
      flops: of bfloat16 products a second.
      memory_bandwidth: bytes a second.
      interconnect: bytes a second that a device can send over all its links to others of its slice or node.
      network: bytes a second that a device can send to other slices or nodes.
      source: of the figures.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    interconnect: float
    network: float
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        # The pages give the interconnect in both directions together, and the data-center network in bits.
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 400e9 / 2, 25e9 / 8, _TPU + "v5e"),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 1200e9 / 2, 50e9 / 8, _TPU + "v5p"),
        Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 800e9 / 2, 100e9 / 8, _TPU + "v6e"),
        Chip("tpu7x", 94.75 * GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2 / 2, 100e9 / 8 / 2, _TPU + "tpu7x"),
        # NVLink is given in both directions together; a network of 400 Gb/s for each GPU.
        Chip("h100", 84929347584, 989e12, 3352e9, 450e9, 50e9, "https://www.nvidia.com/en-us/data-center/h100/ (SXM)"),
    )
}
"""By name."""

_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
}
"""``jax.Device.device_kind`` of the chips."""


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the chip of a device; None where it is not known (a CPU, say)."""
    name = _KINDS.get(device.device_kind)
    return None if name is None else CHIPS[name]
