"""Attention inside ``jax.shard_map``: batch and heads divided among devices give what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import arguments_of, compiled, relative_error
from cases import Shape, any_ends
from processes import run

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import tuning_table, xla
from pallas_kernels.nats_attention.tiling import Problem

BY_BATCH, BY_HEAD, BY_KV_HEAD = jax.P("data"), jax.P("data", None, "tensor"), jax.P("data", "tensor")
ROWS, KEYS = jax.P("data", "context"), jax.P("data", None, "context")


def error_of(mesh, shape, specs, axis_name=None, **options):
    """Returns the largest error of values and gradients over a mesh, against the same call without one.

    ``specs`` are those of query, key, roles and ends of documents.
    """

    def attention(q, k, v, roles, end, axis_name=None):
        draw = jax.random.key(3)  # one draw a call, the same on every device
        given = {"document_end": end, "sample_key": draw, "axis_name": axis_name, "implementation": "xla"}
        return na.nats_attention(q, k, v, roles, window=shape.window, **given, **options)

    rows, keys, *others = specs
    divided = functools.partial(attention, axis_name=axis_name)
    sharded = jax.shard_map(divided, mesh=mesh, in_specs=(rows, keys, keys, *others), out_specs=rows)
    arguments = arguments_of(shape, [("random", "packed")], np.random.default_rng(0), spread=3.0)
    specs = (rows, keys, keys, *others, rows)
    placed = jax.device_put(arguments, tuple(jax.NamedSharding(mesh, spec) for spec in specs))
    pairs = zip(compiled(sharded, *placed), compiled(attention, *arguments), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def mesh_of(other="tensor", *sizes, axis_type=jax.sharding.AxisType.Auto):
    return jax.make_mesh(sizes, ("data", other), axis_types=(axis_type,) * 2)


def error_of_intervals(mesh, shape, rows, ends, axis_name=None):
    """Returns the error of values and gradients through values and log-sum-exp, against the call without a mesh.

    Where the sequence is divided, keys that nothing reads are NaN.
    """
    q, k, v, _, end, _ = arguments_of(shape, [("random", "packed")], np.random.default_rng(0), spread=3.0)
    index, size, rng = np.arange(shape.length), (shape.b, shape.k, shape.length), np.random.default_rng(1)
    key_end = np.broadcast_to(np.asarray(end)[:, None], size)
    if axis_name:
        drawn = any_ends(np.broadcast_to(index, size), rng)
        key_end = np.where(rng.random(size) < 0.3, drawn, np.minimum(key_end, index + 9)).astype(np.int32)
        unread = jnp.moveaxis(jnp.asarray(key_end <= index), 1, 2)[..., None]
        k, v = (jnp.where(unread, jnp.nan, x) for x in (k, v))

    def gradient(mesh, axis_name):
        def attend(*arrays):
            return na.interval_attention(*arrays, return_lse=True, implementation="xla", axis_name=axis_name)

        if mesh:
            attend = jax.shard_map(attend, mesh=mesh, in_specs=(rows, rows, rows, ends), out_specs=(rows, rows))

        def loss(*arrays):
            out, lse = attend(*arrays, key_end)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))

    pairs = zip(gradient(mesh, axis_name), gradient(None, None), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def test_four_devices_give_what_one_gives():
    done = run(__file__, devices=4)
    assert (done.returncode, done.stdout) == (0, "4 devices\n"), done.stderr


def test_the_benchmark_divides_heads_among_devices():
    few = ["--lengths=40", "--passes=forward", "--windows=4", "--repeats=1", "--heads=4,2,8"]
    done = run("-m", "benchmarks.attention", *few, "--devices=2", devices=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla, 2 cpu devices")
    done = run("-m", "benchmarks.attention", *few, "--devices=3", devices=3)
    assert done.returncode == 2
    assert "2 KV heads do not divide evenly among them" in done.stderr


def test_a_core_that_has_a_device_to_itself_gets_smaller_tiles(monkeypatch):
    problem = Problem(1, 8192, 8192, 2, 4, 64, 256, "float32")

    def pairs(devices, problem):
        monkeypatch.setattr(jax, "local_device_count", lambda: devices)
        tiling = tuning_table.choose("xla", xla, problem)
        return tiling.query_block * tiling.key_block * tiling.lanes

    tuned = next(row.problem for row in tuning_table.read_table() if (row.backend, row.device) == ("xla", "cpu"))
    for each in (problem, tuned):  # what was timed on one device of many cores says nothing about a core
        assert pairs(10**6, each) < pairs(0, each)


def main():
    shape, explicit = Shape(2, 70, 4, 2, 8, 5), jax.sharding.AxisType.Explicit
    heads, rows = (BY_HEAD, BY_HEAD, BY_KV_HEAD, BY_BATCH), (ROWS, ROWS, KEYS, ROWS)
    shared = (BY_HEAD, BY_BATCH, BY_BATCH, BY_BATCH)  # by the shards of the query heads
    by_head, by_row = mesh_of("tensor", 1, 4, axis_type=explicit), mesh_of("context", 1, 4, axis_type=explicit)
    for mesh, sizes, specs, options in (
        (mesh_of("tensor", 2, 2), {"k": 1, "g": 4}, shared, {}),
        (by_head, {"window": (2, 9)}, heads, {"mask_gradient": "sampled"}),
        # A draw whose strata the pieces do not cut is the draw of one device.
        (by_row, {"length": 72, "window": (2, 30)}, rows, {"axis_name": "context"}),
        (by_row, {"length": 256}, rows, {"axis_name": "context", "mask_gradient": na.Sampled(0.5)}),
    ):
        error = error_of(mesh, shape._replace(**sizes), specs, **options)
        assert error < 1e-5, f"{mesh} {options}: {error}"
    error = error_of_intervals(mesh_of("tensor", 2, 2), shape, BY_HEAD, BY_KV_HEAD)
    assert error < 1e-5, f"interval_attention: {error}"
    error = error_of_intervals(mesh_of("context", 1, 4), shape._replace(length=48), ROWS, KEYS, "context")
    assert error < 1e-5, f"interval_attention, sequence: {error}"
    print(f"{jax.device_count()} devices")


if __name__ == "__main__":
    main()
