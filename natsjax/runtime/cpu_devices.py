"""A CPU device for each core, so that a program's small operations keep all cores busy.

XLA's CPU runtime runs nearly all operations of one device's program one after the other, and few of them use several
cores; the programs of several devices run side by side (docs/attention.md).
"""

import os
from collections.abc import Callable

from natsjax.runtime.log import logger

_SET = "JAX_NUM_CPU_DEVICES"


def use_cores(fits: Callable[[int], bool]) -> int:
    """Makes a CPU device of each core, or as many as fit; to be called before JAX touches a device.

    Nothing is done where the number is set already (``JAX_NUM_CPU_DEVICES``, or XLA's flag), where several processes
    share the machine, or where devices were touched; on a machine with accelerators nothing uses CPU devices.

    Args:
      fits: returns True for a number of devices among which the work can be divided.

    Returns:
      Number of CPU devices that were asked for; 1 where nothing was done.
    """
    import jax

    from pallas_kernels.nats_attention.tiling import num_cores

    is_set = _SET in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or jax.distributed.is_initialized():
        return 1
    count = next((count for count in range(num_cores(), 1, -1) if fits(count)), 1)
    if count == 1:
        return 1
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # devices were touched: a program of the user's calls a command's main
        return 1
    if jax.default_backend() != "cpu":
        return 1
    logger.info(f"using {count} CPU devices for {num_cores()} cores; {_SET}=1 switches this off")
    return count
