"""Which platform is a program traced for?"""

import jax


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in use, which compilation ahead of time sets, or else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else general_name(device.platform)


def general_name(platform: str) -> str:
    """ "gpu" for the names of its kinds."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
