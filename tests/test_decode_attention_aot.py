"""Decode attention compiled for real chips: it compiles, and the buffer is not copied."""

import functools
import re

import aot
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention as da
from pallas_kernels.decode_attention import cudnn

pytestmark = pytest.mark.aot

NUM_LAYERS, BATCH, NUM_KV_HEADS, GROUP = 2, 2, 4, 4
BLOCK = {"tpu": 256, "gpu": None}
MOST_TEMPORARIES = 0.1
"""Fraction of the bytes of keys and values; a copy would be 1, one layer 0.5."""


def arguments_of(platform, slots, head_dim, dtype, mesh, spec=(), num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS):
    """Query, key, value, storage, key_end, length, position; ``spec`` divides batch and heads."""

    array = functools.partial(aot.array, mesh)
    row, heads = (BATCH, num_kv_heads), (num_layers, BATCH, num_kv_heads)
    plain = jax.ShapeDtypeStruct((*heads, slots, head_dim), dtype)
    store = functools.partial(da.Storage.of, format=da.storage_format(platform), block=BLOCK[platform])
    storage = jax.tree.map(
        lambda x: array(x.dtype, *x.shape, spec=(None, None, *spec)), jax.eval_shape(store, plain, plain)
    )
    return (
        array(dtype, BATCH, num_kv_heads * GROUP, head_dim, spec=spec),
        *[array(dtype, *row, head_dim, spec=spec)] * 2,
        storage,
        array(jnp.int32, *heads, slots, spec=(None, *spec)),
        array(jnp.int32, *heads, spec=(None, *spec)),
        array(jnp.int32, BATCH, spec=spec[:1]),
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


@aot.has_libtpu
@pytest.mark.parametrize("slots", [8192, 131072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_the_tpu_kernel_reads_the_buffer_where_it_lies(chip, head_dim, dtype, slots):
    mesh = aot.mesh_of(chip)
    arguments = arguments_of("tpu", slots, head_dim, dtype, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=arguments[0].sharding)
    what = f"{chip}, head dim {head_dim}, {dtype}, {slots} slots"
    once = compile_on(mesh, decode, *arguments)
    assert "tpu_custom_call" in once.as_text()
    assert_not_copied(once, arguments[3], what)
    assert_not_copied(compile_on(mesh, steps, *arguments, number, donate=(3, 4)), arguments[3], f"{what}, a loop")


@aot.has_libtpu
def test_the_tpu_kernel_compiles_for_any_number_of_heads():
    mesh = aot.mesh_of("v5e")
    for num_kv_heads in (1, 3, 5, 6, 10, 30):  # one, several or no divisor of a register's eight rows
        arguments = arguments_of("tpu", 1024, 64, "bfloat16", mesh, num_kv_heads=num_kv_heads)
        assert "tpu_custom_call" in compile_on(mesh, decode, *arguments).as_text(), num_kv_heads


@aot.has_libtpu
def test_the_tpu_kernel_compiles_inside_shard_map():
    """Batch and heads divided among four chips: the kernel keeps the axes that arrays vary over, as JAX checks."""
    spec = ("data", "tensor")
    mesh = aot.mesh_of("v5e", (2, 2), spec)
    arguments = arguments_of("tpu", 8192, 64, "bfloat16", mesh, spec)
    specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
    attend = functools.partial(decode, implementation="pallas_tpu")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=jax.P(*spec))
    assert "tpu_custom_call" in compile_on(mesh, sharded, *arguments).as_text()


@aot.has_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_reads_a_buffer_of_one_layer_where_it_lies(head_dim, monkeypatch):
    """Compiles for an H100; XLA asks cuDNN for a plan later, on the machine itself: a refusal would not show."""
    monkeypatch.setattr(cudnn._library, "check_cudnn_version", lambda: 91200)
    mesh = aot.mesh_of("h100")
    arguments = arguments_of("gpu", 8192, head_dim, "bfloat16", mesh, num_layers=1)
    compiled = compile_on(mesh, functools.partial(decode, layer=0), *arguments)
    assert "__cudnn$fmha" in compiled.as_text()
    assert_not_copied(compiled, arguments[3], f"h100, head dim {head_dim}")
