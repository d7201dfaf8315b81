"""Decode attention compiled for real chips, on a machine without one. It takes libtpu or the CUDA plugin (without its
libraries), so it is a job of its own:

    JAX_PLATFORMS=cpu python -m pytest -n 0 -m aot tests/test_decode_attention_aot.py

Nothing runs: that Mosaic takes a kernel says that its layouts and its memory fit, not that it is right or fast. That a
buffer is not copied can be read off the program.
"""

import importlib.util
import os

# Before libtpu is loaded: it would ask the cloud's metadata server which machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from test_attention_gpu_aot import H100
from test_attention_tpu_aot import TOPOLOGIES

from pallas_kernels import decode_attention as da
from pallas_kernels.decode_attention import cudnn

pytestmark = pytest.mark.aot
has_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu] has it"
)
has_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt",
)

NUM_LAYERS, BATCH, NUM_KV_HEADS, GROUP = 2, 2, 4, 4
BLOCK = {"tpu": 256, "gpu": None}
MOST_TEMPORARIES = 0.1
"""Fraction of the bytes of keys and values; a copy would be 1, one layer 0.5."""


@functools.cache
def devices(chip):
    if chip == "h100":
        options = {"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H100}
        return topologies.get_topology_desc(**options).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def arguments_of(platform, slots, head_dim, dtype, mesh, spec=(), num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS):
    """Query, key, value, storage, key_end, length, position; ``spec`` divides batch and heads."""

    def array(dtype, *shape, axes=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*axes)))

    row, heads = (BATCH, num_kv_heads), (num_layers, BATCH, num_kv_heads)
    plain = jax.ShapeDtypeStruct((*heads, slots, head_dim), dtype)
    store = functools.partial(da.Storage.of, format=da.storage_format(platform), block=BLOCK[platform])
    storage = jax.tree.map(
        lambda x: array(x.dtype, *x.shape, axes=(None, None, *spec)), jax.eval_shape(store, plain, plain)
    )
    return (
        array(dtype, BATCH, num_kv_heads * GROUP, head_dim, axes=spec),
        *[array(dtype, *row, head_dim, axes=spec)] * 2,
        storage,
        array(jnp.int32, *heads, slots, axes=(None, *spec)),
        array(jnp.int32, *heads, axes=(None, *spec)),
        array(jnp.int32, BATCH, axes=spec[:1]),
    )


def decode(query, key, value, storage, key_end, length, position, layer=1, implementation=None):
    numbers = {"key_end": key_end, "length": length, "position": position, "layer": layer}
    return da.decode_attention(query, key, value, storage, **numbers, implementation=implementation)


def steps(query, key, value, storage, key_end, length, position, number):
    """A loop over tokens and one over layers; all layers write at the end of a step."""
    layers = jnp.arange(storage.shape[0])

    def step(i, carry):
        query, storage, key_end, length, position = carry

        def layer(query, which):
            query = decode(query, key, value, storage, key_end, length, position, which)
            return query, (key + which.astype(key.dtype), value)

        query, new = jax.lax.scan(layer, query, layers)
        is_new = jnp.arange(storage.capacity) == length[..., None]
        key_end = jnp.where(is_new, position[:, None, None] + 99, key_end)
        return query, storage.put(length, *new), key_end, length + 1, position + 1

    return jax.lax.fori_loop(0, number, step, (query, storage, key_end, length, position))


def compile_on(mesh, function, *arguments, donate=()):
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def assert_not_copied(compiled, storage, what):
    """Keys and values are neither temporaries nor copied within the memory of the results."""
    size = sum(x.size * x.dtype.itemsize for x in storage.arrays)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{what}: {temporary >> 10} KiB of temporaries beside {size >> 20} MiB of keys and values")
    assert temporary < MOST_TEMPORARIES * size, what
    shape = ",".join(map(str, storage.arrays[0].shape))
    # An operation, or a layout in another memory, S(1).
    copy = rf"\[{shape}\](?:\S* (?:copy|copy-start|transpose)\(|\{{\S*S\(\d)"
    copies = [line for line in compiled.as_text().splitlines() if re.search(copy, line)]
    assert not copies, copies[0]


@has_libtpu
@pytest.mark.parametrize("slots", [8192, 131072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_tpu_kernel_reads_the_buffer_where_it_lies(chip, head_dim, dtype, slots):
    mesh = Mesh(np.array(devices(chip)[:1]), ("device",))
    arguments = arguments_of("tpu", slots, head_dim, dtype, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=arguments[0].sharding)
    what = f"{chip}, head dim {head_dim}, {dtype}, {slots} slots"
    once = compile_on(mesh, decode, *arguments)
    assert "tpu_custom_call" in once.as_text()
    assert_not_copied(once, arguments[3], what)
    assert_not_copied(compile_on(mesh, steps, *arguments, number, donate=(3, 4)), arguments[3], f"{what}, a loop")


@has_libtpu
def test_the_tpu_kernel_compiles_for_any_number_of_heads():
    mesh = Mesh(np.array(devices("v5e")[:1]), ("device",))
    for num_kv_heads in (1, 3, 5, 6, 10, 30):  # one, several or no divisor of a register's eight rows
        arguments = arguments_of("tpu", 1024, 64, "bfloat16", mesh, num_kv_heads=num_kv_heads)
        assert "tpu_custom_call" in compile_on(mesh, decode, *arguments).as_text(), num_kv_heads


@has_libtpu
def test_the_tpu_kernel_compiles_inside_shard_map():
    """Batch and heads divided among four chips: the kernel keeps the axes that arrays vary over, as JAX checks."""
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "tensor"))
    spec = ("data", "tensor")
    arguments = arguments_of("tpu", 8192, 64, "bfloat16", mesh, spec)
    specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
    attend = functools.partial(decode, implementation="pallas_tpu")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=jax.P(*spec))
    assert "tpu_custom_call" in compile_on(mesh, sharded, *arguments).as_text()


@has_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_reads_a_buffer_of_one_layer_where_it_lies(head_dim, monkeypatch):
    """Compiles for an H100; XLA asks cuDNN for a plan later, on the machine itself: a refusal would not show."""
    monkeypatch.setattr(cudnn._library, "check_cudnn_version", lambda: 91200)
    mesh = Mesh(np.array(devices("h100")[:1]), ("device",))
    arguments = arguments_of("gpu", 8192, head_dim, "bfloat16", mesh, num_layers=1)
    compiled = compile_on(mesh, functools.partial(decode, layer=0), *arguments)
    assert "__cudnn$fmha" in compiled.as_text()
    assert_not_copied(compiled, arguments[3], f"h100, head dim {head_dim}")
