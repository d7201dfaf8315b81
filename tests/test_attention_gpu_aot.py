"""The Hopper backend compiled for an H100: it compiles, and its memory is linear.

This finds shared memory that overflows and layouts that do not fit. Registers that spill show in what ``ptxas -v
-arch=sm_90a`` says of the PTX that ``MOSAIC_GPU_DUMP_PTX=1`` prints.
"""

import aot
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import nats_attention as na

pytestmark = [
    pytest.mark.aot,
    aot.has_cuda,
    pytest.mark.skipif(
        jax.__version_info__[:2] < (0, 11), reason=f"the Hopper backend needs jax >= 0.11; this is {jax.__version__}"
    ),
]


def temporary_bytes(length, head_dim, mask_gradient, tiling=None, dtype="bfloat16", wrap=lambda f: f, window=(256,)):
    """Compiles attention of 8 query heads over 2 KV heads; ``mask_gradient=None`` compiles the forward pass alone."""
    mesh = aot.mesh_of("h100", axes=("x",))

    def attention(*arrays):
        # No implementation is named: that it is this one follows from the device.
        *arrays, sample_key = arrays
        options = {"mask_gradient": mask_gradient or "visible", "sample_key": sample_key, "tiling": tiling}
        return na.nats_attention(*arrays, window=window, **options)

    def loss(*arguments):
        return jnp.sum(wrap(attention)(*arguments).astype(jnp.float32))

    function = attention if mask_gradient is None else jax.grad(loss, (0, 1, 2, 3))
    arguments = aot.attention_arguments(mesh, length, 8, 2, head_dim, dtype, num_roles=2 + len(window))
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    assert "nats_attention_forward" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mask_gradient", [None, "exact", "sampled", "visible"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_an_h100_with_linear_memory(head_dim, mask_gradient):
    small, large = (temporary_bytes(length, head_dim, mask_gradient) for length in (65536, 131072))
    print(f"head dim {head_dim}, {mask_gradient}: {small >> 20} and {large >> 20} MiB of temporaries")
    assert large < 2.2 * small


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tiling_that_it_proposes_compiles(head_dim):
    problem = na.api.Problem(1, 2048, 2048, 2, 4, head_dim, 256, "bfloat16")
    for tiling in na.api.pallas_gpu.candidate_tilings(problem):
        temporary_bytes(2048, head_dim, "exact", tiling)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_several_windows_compile(head_dim):
    temporary_bytes(2048, head_dim, "exact", window=(16, 64, 256))


def test_float16_compiles():
    temporary_bytes(2048, 64, "exact", dtype="float16")


def test_compiles_inside_shard_map():
    """The axes along which arrays vary reach the gradients."""
    specs = (*[jax.P("x")] * 4, jax.P())
    temporary_bytes(2048, 64, "exact", wrap=lambda f: jax.shard_map(f, in_specs=specs, out_specs=jax.P("x")))
