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
        position = intervals.query_position[0]
        hidden = pallas_tpu.masked_out_pass(rows, key, value, position, weight, columns, scale, WINDOW, tiling)
        return out, visible, hidden

    return run, (
        Rows(query, query, by_row, by_row),
        key,
        key,
        Intervals((jnp.int32, 1, length), by_key, by_key),
        RoleColumns(by_key, by_key, by_key, by_key, flags, flags),
        (jnp.float32, length),
    )


@pytest.mark.parametrize(("chip", "head_dim"), [("v5e", 64), ("v5p", 128), ("v6e", 64)])
def test_temporary_memory_grows_linearly(chip, head_dim):
    """What XLA puts into vector memory it does not count, so short sequences seem to need less than they do."""

    def temporaries(length):
        return compile_for(chip, *passes(length, head_dim, "bfloat16")).memory_analysis().temp_size_in_bytes

    short, long = temporaries(131072), temporaries(262144)
    assert long <= 2.2 * short, f"{short / 2**20:.0f} MiB, then {long / 2**20:.0f} MiB"
