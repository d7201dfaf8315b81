"""The platform that a program is traced for."""

import jax


def current_platform() -> str:
    """Returns the platform, "cpu", "gpu" or "tpu", of the mesh in use (set by AOT compilation), or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else general_name(device.platform)


def general_name(platform: str) -> str:
    """Returns "gpu" for the names of its kinds, and other names as they are."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
