"""Attention inside ``jax.shard_map``: batch and heads divided among devices give what one device gives."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import inputs, relative_error, value_and_gradients
from cases import Shape, any_ends, document_ends, role_ids

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import tuning_table, xla
from pallas_kernels.nats_attention.tiling import Problem

TESTS = pathlib.Path(__file__).parent
BY_HEAD, ROLES, BY_BATCH = jax.P("data", None, "tensor"), jax.P("data", "tensor"), jax.P("data")


def arguments_of(shape):
    rng = np.random.default_rng(0)
    q, k, v, weight = inputs(shape, spread=3.0)
    roles = jax.nn.one_hot(role_ids("random", shape, rng), 3)
    return q, k, v, roles, jnp.asarray(document_ends("packed", shape, rng)), weight


def error_of_sharding(mesh, shape, kv_heads=("tensor",), **options):
    """Returns the largest error of values and gradients over a mesh, against the same call without one.

    Without ``kv_heads`` the shards of the query heads share keys, values and roles.
    """
    by_kv_head, roles = jax.P("data", None, *kv_heads), jax.P("data", *kv_heads)

    def attention(q, k, v, roles, end):
        draw = jax.random.key(3)  # one draw a call, the same on every device
        return na.nats_attention(q, k, v, roles, window=shape.window, document_end=end, sample_key=draw, **options)

    specs = (BY_HEAD, by_kv_head, by_kv_head, roles, BY_BATCH)
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=BY_HEAD)
    arguments = arguments_of(shape)
    expected = jax.jit(value_and_gradients, static_argnums=0)(attention, *arguments)
    placed = jax.device_put(arguments, tuple(jax.NamedSharding(mesh, spec) for spec in (*specs, BY_HEAD)))
    got = jax.jit(value_and_gradients, static_argnums=0)(sharded, *placed)
    return max(relative_error(x, y) for x, y in zip(got, expected, strict=True))


def mesh_of(*sizes, axis_type=jax.sharding.AxisType.Auto):
    return jax.make_mesh(sizes, ("data", "tensor"), axis_types=(axis_type,) * 2)


def error_of_intervals(mesh, shape):
    """Returns the error of the gradient through values and log-sum-exp, against the call without a mesh."""
    q, k, v, _, end, _ = arguments_of(shape)
    key_end = jnp.broadcast_to(end[:, None], (shape.b, shape.k, shape.length))

    def attend(*arrays):
        return na.interval_attention(*arrays, return_lse=True, implementation="xla")

    def gradient(attend):
        def loss(*arrays):
            out, lse = attend(*arrays, key_end)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    specs = (BY_HEAD, BY_HEAD, BY_HEAD, ROLES)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(BY_HEAD, BY_HEAD))
    return max(relative_error(x, y) for x, y in zip(gradient(sharded), gradient(attend), strict=True))


def error_of_divided_sequence(mask_gradient, length):
    """Returns the largest error of values and gradients where the sequence is divided among four devices."""
    mesh = jax.make_mesh((1, 4), ("data", "context"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    shape = Shape(2, length, 4, 2, 8, 5)
    rows, roles = jax.P("data", "context"), jax.P("data", None, "context")

    def attention(q, k, v, roles, end, axis_name=None):
        draw = jax.random.key(3)
        options = {"mask_gradient": mask_gradient, "sample_key": draw, "axis_name": axis_name}
        return na.nats_attention(q, k, v, roles, window=shape.window, document_end=end, implementation="xla", **options)

    def divided(*arrays):
        return attention(*arrays, axis_name="context")

    specs = (rows, rows, rows, roles, rows)
    sharded = jax.shard_map(divided, mesh=mesh, in_specs=specs, out_specs=rows)
    arguments = arguments_of(shape)
    expected = jax.jit(value_and_gradients, static_argnums=0)(attention, *arguments)
    placed = jax.device_put(arguments, tuple(jax.NamedSharding(mesh, spec) for spec in (*specs, rows)))
    got = jax.jit(value_and_gradients, static_argnums=0)(sharded, *placed)
    return max(relative_error(x, y) for x, y in zip(got, expected, strict=True))


def error_of_divided_intervals():
    """Returns the same error of ``interval_attention``, with gradients through values and log-sum-exp."""
    mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    shape = Shape(2, 48, 4, 2, 8, 5)
    q, k, v, _, end, _ = arguments_of(shape)
    index = np.arange(shape.length)
    sliding = np.minimum(np.asarray(end)[:, None], index + 9)
    rng = np.random.default_rng(1)
    size = (shape.b, shape.k, shape.length)
    key_end = np.where(rng.random(size) < 0.3, any_ends(np.broadcast_to(index, size), rng), sliding).astype(np.int32)
    unread = jnp.moveaxis(jnp.asarray(key_end <= index), 1, 2)[..., None]
    k, v = (jnp.where(unread, jnp.nan, x) for x in (k, v))
    rows = jax.P(None, "context")

    def gradient(axis_name):
        def attend(*arrays):
            return na.interval_attention(*arrays, return_lse=True, implementation="xla", axis_name=axis_name)

        if axis_name is not None:
            specs = (rows, rows, rows, jax.P(None, None, "context"))
            attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(rows, rows))

        def loss(*arrays):
            out, lse = attend(*arrays, key_end)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    got, expected = (jax.tree.leaves(gradient(name)) for name in ("context", None))
    return max(relative_error(x, y) for x, y in zip(got, expected, strict=True))


def run_with_devices(*command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


def test_four_devices_give_what_one_gives():
    run = run_with_devices(__file__)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "4 devices\n"


def test_the_benchmark_divides_heads_among_devices():
    few = ["--lengths=40", "--passes=forward", "--windows=4", "--repeats=1", "--heads=4,2,8"]
    run = run_with_devices("-m", "benchmarks.attention", *few, "--devices=2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("xla, 2 cpu devices")
    run = run_with_devices("-m", "benchmarks.attention", *few, "--devices=3")
    assert run.returncode == 2
    assert "2 KV heads do not divide evenly among them" in run.stderr


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
    jax.config.update("jax_num_cpu_devices", 4)
    shape = Shape(2, 70, 4, 2, 8, 5)
    explicit = mesh_of(1, 4, axis_type=jax.sharding.AxisType.Explicit)
    one_kv_head = shape._replace(k=1, g=4)
    for mesh, shape_, kv_heads, mask_gradient in (
        (mesh_of(2, 2), one_kv_head, (), "exact"),
        (explicit, shape, ("tensor",), "sampled"),
    ):
        error = error_of_sharding(mesh, shape_, kv_heads, mask_gradient=mask_gradient, implementation="xla")
        assert error < 1e-5, f"{mesh} {mask_gradient}: {error}"
    error = error_of_intervals(mesh_of(2, 2), shape)
    assert error < 1e-5, f"interval_attention: {error}"
    # A draw whose strata the pieces do not cut is the draw of one device.
    for mask_gradient, length in (("exact", 72), (na.Sampled(0.5), 256)):
        error = error_of_divided_sequence(mask_gradient, length)
        assert error < 1e-5, f"sequence {mask_gradient}: {error}"
    error = error_of_divided_intervals()
    assert error < 1e-5, f"interval_attention, sequence: {error}"
    print(f"{jax.device_count()} devices")


if __name__ == "__main__":
    main()
