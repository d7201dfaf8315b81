"""Topologies to compile for, by name: the devices as the compilers describe them, and their chips.

No accelerator is needed: libtpu and XLA's plugin for CUDA describe hardware that the machine does not have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import TYPE_CHECKING, Any

from natsjax.config_fields import nearest
from natsjax.errors import UserError
from natsjax.runtime.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

# Cloud TPU's accelerator types count chips, those of v5p count TensorCores, two a chip.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_V5P = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
    8192: "16x16x16",
    12288: "16x16x24",
}
_BY_COUNT = {"v5e": _SHAPES_2D, "v6e": _SHAPES_2D, "v5p": _SHAPES_V5P}
_TORUS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
"""Dimensions of the torus."""
_GPUS_A_NODE = 8
_GPU_FRACTION = 0.75
"""Fraction of a GPU's memory that JAX uses unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""

# XLA's description of an H100, needed to compile for it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: the given name, and the shape if that was not the name.
      devices: from ``jax.experimental.topologies``, or ``jax.devices()``.
      chip: the kind of chip; None if it is unknown.
      domains: slice or node of each device; ``Chip.interconnect`` connects the devices of one.
    """

    name: str
    devices: list[jax.Device]
    chip: Chip | None
    domains: tuple[int, ...]

    def domains_of(self, mesh: Mesh) -> list[int]:
        """Returns the slice or node of each device of a mesh, in the order of the mesh."""
        domain = dict(zip(self.devices, self.domains, strict=True))
        return [domain[device] for device in mesh.devices.flat]


def known_topologies() -> str:
    """Lists the names that ``topology`` takes, for messages."""
    counts = "; ".join(f"{chip}-N with N = {', '.join(map(str, shapes))}" for chip, shapes in _BY_COUNT.items())
    return (
        f"{counts}; v5p:XxYxZ, tpu7x:XxYxZ, v5e:XxY or v6e:XxY, as v5p:4x4x4; h100-N with N = 1, 2, 4 or a multiple "
        f"of {_GPUS_A_NODE}; local, this machine's devices"
    )


def topology(name: str, num_slices: int = 1) -> Topology:
    """Returns the devices of a topology.

    Args:
      name: see ``known_topologies``.
      num_slices: number of such TPU slices, connected by the data-center network.

    Raises:
      UserError: an unknown name (the message lists the known ones), or a compiler that is not installed.
    """
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices}: it must be at least 1.")
    if name == "local":
        return _local(num_slices)
    gpus = re.fullmatch(r"h100-(\d+)", name)
    if gpus:
        return _h100(name, int(gpus[1]), num_slices)
    return _tpu(name, num_slices)


def _unknown(name: str) -> UserError:
    chip = re.split(r"[-:]", name)[0]
    hint = "" if chip in CHIPS else nearest(chip, CHIPS).replace("known here", "chips")
    return UserError(f"unknown topology {name!r}{hint}; known are {known_topologies()}.")


def _local(num_slices: int) -> Topology:
    import jax  # here: the names of topologies are in --help

    if num_slices > 1:
        raise UserError(f"--num_slices={num_slices}: it is for TPU slices; leave it out with --topology=local.")
    devices = jax.devices()
    domains = tuple(device.process_index for device in devices)
    return Topology(f"local ({len(devices)} x {devices[0].device_kind})", devices, None, domains)


def _tpu(name: str, num_slices: int) -> Topology:
    import jax
    from jax.experimental import topologies

    chip, separator, size = name.replace("v5litepod", "v5e").partition(":")
    if not separator:
        chip, _, count = chip.partition("-")
        size = _BY_COUNT.get(chip, {}).get(int(count) if count.isdecimal() else 0, "")
    if chip not in _TORUS or not re.fullmatch(r"\d+" + r"x\d+" * (_TORUS[chip] - 1), size):
        raise _unknown(name)
    # Before libtpu is loaded: else it asks the cloud for the type of this machine, and refuses to be loaded twice.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs the TPUs' compiler, no TPU: pip install 'natsjax[tpu]'.")
    shape = f"{chip}:{size}"
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if size == "1x1":  # else a host has 2x2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--topology={name}: {reason}; known are {known_topologies()}.") from error
    devices = list(found.devices)
    domains = tuple(getattr(device, "slice_index", 0) for device in devices)
    label = name if name == shape else f"{name} ({shape})"
    return Topology(f"{num_slices} x {label}" if num_slices > 1 else label, devices, CHIPS[chip], domains)


def _h100(name: str, count: int, num_slices: int) -> Topology:
    import jax
    from jax.experimental import topologies

    if num_slices > 1:
        raise UserError(
            f"--num_slices={num_slices}: it is for TPU slices; {num_slices} times the GPUs are "
            f"h100-{num_slices * count}."
        )
    if count not in (1, 2, 4) and (count < 1 or count % _GPUS_A_NODE):
        raise _unknown(name)
    nodes, gpus = (1, count) if count < _GPUS_A_NODE else (count // _GPUS_A_NODE, _GPUS_A_NODE)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=f"1x{nodes}x{gpus}", target_config=_H100
        )
    except RuntimeError as error:  # of the plugin; NotImplementedError if it is not installed, or jax is too old
        reason, version = str(error).split("\n")[0], jax.__version__
        raise UserError(
            f"--topology={name} needs jax >= 0.11 and XLA's compiler for CUDA, no GPU: pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} ({reason})."
        ) from error
    devices = list(found.devices)
    fraction = _gpu_fraction()
    chip = dataclasses.replace(CHIPS["h100"], memory=fraction * CHIPS["h100"].memory)
    label = f"{name} ({nodes} node{'s' if nodes > 1 else ''}, {100 * fraction:g} % of the memory)"
    return Topology(label, devices, chip, tuple(index // gpus for index in range(len(devices))))


def _gpu_fraction() -> float:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    text = os.environ.get(name, str(_GPU_FRACTION))
    try:
        fraction = float(text)
    except ValueError as error:
        raise UserError(f"{name} = {text!r}: a fraction of the memory was expected, as 0.9.") from error
    if not 0 < fraction <= 1:
        raise UserError(f"{name} = {text}: it must be above 0 and at most 1.")
    return fraction
