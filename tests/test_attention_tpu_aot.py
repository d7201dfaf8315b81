"""The TPU kernels compiled for real chips: they compile, and their memory is linear."""

import functools

import aot
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import pallas_tpu
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.roles import RoleColumns
from pallas_kernels.nats_attention.tiling import Problem

pytestmark = [pytest.mark.aot, aot.has_libtpu]

NUM_HEADS, NUM_KV_HEADS, WINDOW = 8, 2, 256
MOST_TEMPORARIES = 3
"""Times the bytes of arguments and results; the most that was seen is 2.28."""


def attention(query, key, value, roles, sample_key, mask_gradient, window=WINDOW):
    options = {"window": window, "mask_gradient": mask_gradient, "implementation": "pallas_tpu"}
    return na.nats_attention(query, key, value, roles, sample_key=jax.random.wrap_key_data(sample_key), **options)


def compiled_gradient(attention, arguments):
    def loss(*arguments):
        return jnp.sum(attention(*arguments).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("chip", "length", "head_dim", "dtype", "mask_gradient"),
    [
        ("v5e", 8192, 64, "bfloat16", "exact"),
        ("v5e", 8192, 128, "float32", "exact"),
        ("v5p", 8192, 64, "bfloat16", "sampled"),
        ("v6e", 8192, 64, "bfloat16", "visible"),
        ("v6e", 131072, 128, "bfloat16", "sampled"),
    ],
)
def test_attention_and_its_gradients_compile(chip, length, head_dim, dtype, mask_gradient):
    arguments = aot.attention_arguments(aot.mesh_of(chip), length, NUM_HEADS, NUM_KV_HEADS, head_dim, dtype)
    text = compiled_gradient(functools.partial(attention, mask_gradient=mask_gradient), arguments)
    kernels = ["forward", "query_gradient", "key_gradient", *(["masked_out"] if mask_gradient != "visible" else [])]
    for kernel in kernels:
        assert f"nats_attention_{kernel}" in text
    assert f"{length},{length}]" not in text


@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_several_windows_compile(chip):
    arguments = aot.attention_arguments(aot.mesh_of(chip), 8192, NUM_HEADS, NUM_KV_HEADS, 64, "bfloat16", num_roles=5)
    compiled_gradient(functools.partial(attention, mask_gradient="sampled", window=(16, 64, 256)), arguments)


def passes(length, head_dim, dtype):
    """The three passes of the backend in one function of arrays, and their shapes."""
    group = NUM_HEADS // NUM_KV_HEADS
    problem = Problem(1, length, length, NUM_KV_HEADS, group, head_dim, WINDOW, dtype)
    tiling = pallas_tpu.default_tiling(problem)
    scale = head_dim**-0.5
    query = (dtype, 1, NUM_KV_HEADS, group, length, head_dim)
    key = (dtype, 1, NUM_KV_HEADS, length, head_dim)
    by_row, by_key = (jnp.float32, *query[1:-1]), (jnp.int32, *key[1:-1])
    flags = (jnp.bool_, *key[1:-1])

    def run(rows, key, value, intervals, columns, weight):
        out = pallas_tpu.forward(rows.query, key, value, intervals, scale, tiling)
        visible = pallas_tpu.visible_pass(rows, key, value, intervals, columns, scale, (WINDOW,), tiling)
        hidden = pallas_tpu.masked_out_pass(rows, key, value, intervals, weight, columns, scale, (WINDOW,), tiling)
        return out, visible, hidden

    return run, (
        Rows(query, query, by_row, by_row),
        key,
        key,
        Intervals((jnp.int32, 1, length), by_key, by_key),
        RoleColumns(by_key, by_key, by_key, by_key, flags, flags),
        (jnp.float32, length),
    )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_temporaries_are_linear_in_the_length(chip, head_dim):
    """At a short and at the longest length at most so many times what goes in and comes out.

    Ratios from one length to the next say less: XLA keeps some operands of short sequences in vector memory, which it
    does not count.
    """
    for length in (8192, 131072):
        function, shapes = passes(length, head_dim, "bfloat16")
        structs = jax.tree.map(
            lambda x: aot.array(aot.mesh_of(chip), *x),
            shapes,
            is_leaf=lambda x: type(x) is tuple and not isinstance(x[0], tuple),
        )
        memory = jax.jit(function).lower(*structs).compile().memory_analysis()
        outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
        sizes = f"{length}: {memory.temp_size_in_bytes >> 20} MiB beside {outside >> 20} MiB of arguments and results"
        print(f"{chip}, head dim {head_dim}, {sizes}")
        assert memory.temp_size_in_bytes <= MOST_TEMPORARIES * outside, sizes


def test_compiles_inside_shard_map():
    """Heads divided among four chips: the kernels keep the axes that arrays vary over, as JAX checks."""
    mesh, heads = aot.mesh_of("v5e", (4,), ("tensor",)), (None, None, "tensor")
    specs = (heads, heads, heads, (None, "tensor"), ())
    options = {"in_specs": tuple(jax.P(*spec) for spec in specs), "out_specs": jax.P(*heads)}
    sharded = jax.shard_map(functools.partial(attention, mask_gradient="sampled"), mesh=mesh, **options)
    text = compiled_gradient(sharded, aot.attention_arguments(mesh, 4096, 16, 4, 128, "bfloat16", specs))
    assert "nats_attention_masked_out" in text
