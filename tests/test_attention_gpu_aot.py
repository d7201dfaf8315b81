"""The Hopper backend compiled ahead of time for an H100, without one: it compiles, and its memory is linear.

Run with (minutes; the CUDA plugin without its libraries will do)::

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt  # of the version of jax
    JAX_PLATFORMS=cpu pytest -m aot tests/test_attention_gpu_aot.py

This finds shared memory that overflows and layouts that do not fit. Registers that spill show in what ``ptxas -v
-arch=sm_90a`` says of the PTX that ``MOSAIC_GPU_DUMP_PTX=1`` prints.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from pallas_kernels import nats_attention as na

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        jax.__version_info__[:2] < (0, 11), reason=f"the Hopper backend needs jax >= 0.11; this is {jax.__version__}"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt",
    ),
]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def mesh():
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100)
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def temporary_bytes(mesh, length, head_dim, mask_gradient, tiling=None, dtype=jnp.bfloat16, wrap=lambda f: f):
    """Compiles attention of 8 query heads over 2 KV heads; ``mask_gradient=None`` compiles the forward pass alone."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attention(query, key, value, roles, sample_key):
        # No implementation is named: that it is this one follows from the device.
        return na.nats_attention(
            query,
            key,
            value,
            roles,
            window=256,
            mask_gradient=mask_gradient or "visible",
            sample_key=sample_key,
            tiling=tiling,
        )

    def loss(*arguments):
        return jnp.sum(wrap(attention)(*arguments).astype(jnp.float32))

    key = array(1, length, 2, head_dim)
    arguments = (
        array(1, length, 8, head_dim),
        key,
        key,
        array(1, 2, length, 3, dtype=jnp.float32),
        array(2, dtype=jnp.uint32),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(attention if mask_gradient is None else jax.grad(loss, (0, 1, 2, 3)))
        compiled = compiled.lower(*arguments).compile()
    assert "nats_attention_forward" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mask_gradient", [None, "exact", "sampled", "visible"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_an_h100_with_linear_memory(mesh, head_dim, mask_gradient):
    small, large = (temporary_bytes(mesh, length, head_dim, mask_gradient) for length in (65536, 131072))
    print(f"head dim {head_dim}, {mask_gradient}: {small >> 20} and {large >> 20} MiB of temporaries")
    assert large < 2.2 * small


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tiling_that_it_proposes_compiles(mesh, head_dim):
    problem = na.api.Problem(1, 2048, 2048, 2, 4, head_dim, 256, "bfloat16")
    for tiling in na.api.pallas_gpu.candidate_tilings(problem):
        temporary_bytes(mesh, 2048, head_dim, "exact", tiling)


def test_float16_compiles(mesh):
    temporary_bytes(mesh, 2048, 64, "exact", dtype=jnp.float16)


def test_compiles_inside_shard_map(mesh):
    """The axes along which arrays vary reach the gradients."""
    spec = jax.sharding.PartitionSpec("x")

    def wrap(attention):
        in_specs = (*[spec] * 4, jax.sharding.PartitionSpec())
        return jax.shard_map(attention, in_specs=in_specs, out_specs=spec)

    temporary_bytes(mesh, 2048, 64, "exact", wrap=wrap)
