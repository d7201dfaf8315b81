"""Which platform is a program traced for?"""

import jax


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in use, which compilation ahead of time sets, or else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        platform = device.platform
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    return jax.default_backend()
