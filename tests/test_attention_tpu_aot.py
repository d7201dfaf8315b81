"""The TPU kernels compiled for real chips, on a machine without one. It takes libtpu and some minutes, so it is a job
of its own:

    pip install -e '.[test,tpu]'
    JAX_PLATFORMS=cpu python -m pytest -n 0 -m aot tests/test_attention_tpu_aot.py

Nothing runs: that Mosaic takes a kernel says that its layouts and its memory fit, not that it is right or fast.
"""

import importlib.util
import os

# Before libtpu is loaded: it would ask the cloud's metadata server which machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import pallas_tpu
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.roles import RoleColumns
from pallas_kernels.nats_attention.tiling import Problem

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu] has it"),
]

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
NUM_HEADS, NUM_KV_HEADS, WINDOW = 8, 2, 256
MOST_TEMPORARIES = 3
"""Times the bytes of arguments and results; the most that was seen is 2.28."""


@functools.cache
def sharding(chip):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("device",)), PartitionSpec())


def compile_for(chip, function, shapes):
    """``shapes`` is a tree of ``(dtype, *shape)``."""
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x[1:], x[0], sharding=sharding(chip)),
        shapes,
        is_leaf=lambda x: type(x) is tuple and not isinstance(x[0], tuple),
    )
    return jax.jit(function).lower(*structs).compile()


def loss(query, key, value, roles, sample_key, *, mask_gradient):
    out = na.nats_attention(
        query,
        key,
        value,
        roles,
        window=WINDOW,
        mask_gradient=mask_gradient,
        sample_key=jax.random.wrap_key_data(sample_key),
        implementation="pallas_tpu",
    )
    return jnp.sum(out.astype(jnp.float32))


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
    key = (dtype, 1, length, NUM_KV_HEADS, head_dim)
    shapes = [
        (dtype, 1, length, NUM_HEADS, head_dim),
        key,
        key,
        (jnp.float32, 1, NUM_KV_HEADS, length, na.NUM_ROLES),
        (jnp.uint32, 2),
    ]
    gradient = jax.grad(functools.partial(loss, mask_gradient=mask_gradient), argnums=(0, 1, 2, 3))
    text = compile_for(chip, gradient, shapes).as_text()
    kernels = ["forward", "query_gradient", "key_gradient", *(["masked_out"] if mask_gradient != "visible" else [])]
    for kernel in kernels:
        assert f"nats_attention_{kernel}" in text
    assert f"{length},{length}]" not in text


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
        visible = pallas_tpu.visible_pass(rows, key, value, intervals, columns, scale, WINDOW, tiling)
        hidden = pallas_tpu.masked_out_pass(rows, key, value, intervals, weight, columns, scale, WINDOW, tiling)
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
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_temporaries_are_linear_in_the_length(chip, head_dim):
    """At a short and at the longest length at most so many times what goes in and comes out.

    Ratios from one length to the next say less: XLA keeps some operands of short sequences in vector memory, which it
    does not count.
    """
    for length in (8192, 131072):
        memory = compile_for(chip, *passes(length, head_dim, "bfloat16")).memory_analysis()
        outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
        sizes = f"{length}: {memory.temp_size_in_bytes >> 20} MiB beside {outside >> 20} MiB of arguments and results"
        print(f"{chip}, head dim {head_dim}, {sizes}")
        assert memory.temp_size_in_bytes <= MOST_TEMPORARIES * outside, sizes


def test_compiles_inside_shard_map():
    """Heads divided among four chips: the kernels keep the axes that arrays vary over, as JAX checks."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"])
    mesh = Mesh(np.array(topology.devices), ("tensor",))
    heads, roles = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")

    def attention(query, key, value, roles, sample_key):
        draw = jax.random.wrap_key_data(sample_key)
        options = {"window": WINDOW, "mask_gradient": "sampled", "implementation": "pallas_tpu"}
        return na.nats_attention(query, key, value, roles, sample_key=draw, **options)

    in_specs = (heads, heads, heads, roles, PartitionSpec())
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=in_specs, out_specs=heads)

    def loss_over_mesh(*arguments):
        return jnp.sum(sharded(*arguments).astype(jnp.float32))

    shapes = [(1, 4096, 16, 128), (1, 4096, 4, 128), (1, 4096, 4, 128), (1, 4, 4096, na.NUM_ROLES), (2,)]
    dtypes = [*[jnp.bfloat16] * 3, jnp.float32, jnp.uint32]
    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, in_specs, strict=True)
    ]
    text = jax.jit(jax.grad(loss_over_mesh, argnums=(0, 1, 2, 3))).lower(*structs).compile().as_text()
    assert "nats_attention_masked_out" in text
