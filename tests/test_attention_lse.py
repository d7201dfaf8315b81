"""The log-sum-exp of ``nats_attention``, and a sink made of it: values and gradients, of the roles too."""

import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import DOCUMENTS, compiled, inputs, relative_error, value_and_gradients
from cases import ROLE_PATTERNS, SHAPES, Shape, document_ends, pairs_of, role_ids
from processes import SLOW

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import reference
from pallas_kernels.nats_attention.pallas_gpu import GpuTiling
from pallas_kernels.nats_attention.pallas_tpu import TpuTiling

TESTS = pathlib.Path(__file__).parent
GRADIENTS = ("exact", "visible")


def sinks(num_heads):
    """A sink of each query head, of little and of much weight."""
    return np.linspace(-1.5, 2.5, num_heads)


def below_sink(out, lse):
    """The heads' results where each head has a sink."""
    return out * jax.nn.sigmoid(lse - jnp.asarray(sinks(out.shape[2]), lse.dtype))[..., None].astype(out.dtype)


@functools.cache
def by_lse(window, sampled=None, **options):
    """``attention(q, k, v, roles, document_end)`` with sinks, from what ``nats_attention`` returns."""

    def attention(q, k, v, roles, end):
        drawn = {}
        if sampled is not None:
            drawn = {"mask_gradient": na.Sampled(sampled), "sample_key": jax.random.key(7)}
        return below_sink(
            *na.nats_attention(q, k, v, roles, window=window, document_end=end, return_lse=True, **drawn, **options)
        )

    return attention


@functools.cache
def by_closed_form(window, clip, visible_only=False):
    def attention(q, k, v, roles, end):
        return below_sink(
            *reference.closed_form_attention(
                q, k, v, roles, end, window, q.shape[-1] ** -0.5, clip, visible_only, return_lse=True
            )
        )

    return attention


@functools.cache
def by_definition(window):
    """A dense softmax under the relaxed mask with one more logit, whose value is 0."""

    def attention(q, k, v, roles, end):
        (b, t, n, h), num_kv = q.shape, k.shape[2]
        grouped = q.reshape(b, t, num_kv, n // num_kv, h)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k) / h**0.5
        mask = reference.relaxed_mask(roles, window=window, document_end=end)[:, :, None]
        sink = sinks(n).reshape(num_kv, n // num_kv, 1, 1)
        weights = mask * jnp.exp(logits)
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)

    return attention


def wide(arguments):
    return [x if x is None or x.dtype == np.int32 else np.asarray(x, np.float64) for x in arguments]


def expected_of(shape, arguments, mask_gradient):
    with jax.enable_x64(True):
        return compiled(by_closed_form(shape.window, True, mask_gradient == "visible"), *wide(arguments))


def cases_of(shape, seed=2, spread=3.0):
    """``(name, arguments)`` for each pattern of roles and each of documents; for every pair of them if slow."""
    rng = np.random.default_rng(seed)
    q, k, v, weight = inputs(shape, spread=spread)
    for pattern, documents in pairs_of(ROLE_PATTERNS, DOCUMENTS, every=SLOW):
        ids, end = role_ids(pattern, shape, rng), document_ends(documents, shape, rng)
        if end is None:  # spelled out, so that it is not another compilation
            end = np.full((shape.b, shape.length), shape.length, np.int32)
        yield f"{pattern} {documents}", (q, k, v, jax.nn.one_hot(ids, 3), end, weight)


@pytest.mark.larger
@pytest.mark.parametrize("name", ["one_token", "tiny", "grouped", "no_window", "wide_window"])
def test_closed_form_equals_autodiff_of_the_relaxed_mask(name):
    """In float64 and without the clip; with a sink, whose gradient goes through the log-sum-exp."""
    shape = SHAPES[name]
    with jax.enable_x64(True):
        for case, arguments in cases_of(shape, seed=1, spread=1.0):
            got = compiled(by_closed_form(shape.window, False), *wide(arguments))
            expected = compiled(by_definition(shape.window), *wide(arguments))
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11 * (1 + np.abs(y).max()), err_msg=case)


def test_relaxed_attention_returns_the_log_sum_exp_of_the_mask():
    shape = SHAPES["grouped"]

    @functools.cache
    def relaxed(window):
        return lambda q, k, v, roles, end: below_sink(
            *reference.relaxed_attention(q, k, v, roles, window=window, document_end=end, return_lse=True)
        )

    with jax.enable_x64(True):
        for case, arguments in itertools.islice(cases_of(shape, seed=1, spread=1.0), 6):
            got, expected = (compiled(f(shape.window), *wide(arguments)) for f in (relaxed, by_definition))
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11 * (1 + np.abs(y).max()), err_msg=case)


@pytest.mark.larger
@pytest.mark.parametrize("mask_gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["one_token", "tiny", "grouped", "no_window", "two_blocks"])
def test_xla_equals_the_oracle(name, mask_gradient):
    shape = SHAPES[name]
    for case, arguments in cases_of(shape):
        got = compiled(by_lse(shape.window, mask_gradient=mask_gradient, implementation="xla"), *arguments)
        for x, y in zip(got, expected_of(shape, arguments, mask_gradient), strict=True):
            assert relative_error(x, y) < 2e-5, case


def test_sampled_rows_are_an_unbiased_sample_and_all_of_them_are_exact():
    shape = SHAPES["grouped"]
    _, arguments = next(cases_of(shape))
    expected = expected_of(shape, arguments, "exact")
    # With a run in every stratum the sampled path draws all queries; queries, keys and values never depend on it.
    got = compiled(by_lse(shape.window, 0.999, implementation="xla"), *arguments)
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < 2e-5
    few = compiled(by_lse(shape.window, 0.3, implementation="xla"), *arguments)
    for x, y in zip(few[:4], expected[:4], strict=True):
        assert relative_error(x, y) < 2e-5

    def of_key(seed):
        def loss(roles):
            out, lse = na.nats_attention(
                *(*arguments[:3], roles),
                window=shape.window,
                document_end=arguments[4],
                mask_gradient=na.Sampled(0.3),
                sample_key=jax.random.key(seed),
                return_lse=True,
            )
            return jnp.sum(below_sink(out, lse) * arguments[5])

        return jax.grad(loss)(arguments[3])

    draws = np.asarray(jax.jit(lambda seeds: jax.lax.map(of_key, seeds))(jnp.arange(600)), np.float64)
    spread = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - expected[4]) <= 5 * spread + 1e-4)


def test_without_the_log_sum_exp_nothing_changes():
    shape = SHAPES["grouped"]
    _, (q, k, v, roles, end, weight) = next(cases_of(shape))

    def loss(return_lse, q, k, v, roles):
        found = na.nats_attention(q, k, v, roles, window=shape.window, document_end=end, return_lse=return_lse)
        return jnp.sum((found[0] if return_lse else found) * weight)

    plain, with_lse = (
        jax.jit(jax.value_and_grad(functools.partial(loss, flag), argnums=(0, 1, 2, 3)))(q, k, v, roles)
        for flag in (False, True)
    )
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(with_lse), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_nobody_reads_has_no_log_sum_exp_and_no_gradient():
    shape = SHAPES["tiny"]
    q, k, v, _ = inputs(shape)
    end = np.array([[4, 4, 4, 4, 0, 0], [0] * 6], np.int32)
    roles = jax.nn.one_hot(jnp.zeros((2, 1, 6), jnp.int32), 3)

    def loss(q, k, v, roles):
        out, lse = na.nats_attention(q, k, v, roles, window=1, document_end=end, return_lse=True)
        return jnp.sum(below_sink(out, lse)), lse

    (_, lse), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, roles)
    np.testing.assert_array_equal(np.isneginf(lse), np.stack([[0] * 4 + [1] * 2, [1] * 6]).astype(bool)[..., None])
    assert all(np.isfinite(x).all() for x in gradients)
    for x in gradients[:3]:
        assert not np.asarray(x)[end == 0].any()
    nothing = jnp.zeros((2, 0, 1, 4))
    out, lse = na.nats_attention(nothing, nothing, nothing, jnp.zeros((2, 1, 0, 3)), window=1, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 1, 4), (2, 0, 1))


@pytest.mark.parametrize("mask_gradient", GRADIENTS)
def test_pallas_tpu_equals_the_oracle(mask_gradient):
    shape = Shape(1, 261, 1, 2, 64, 5)
    options = {"implementation": "pallas_tpu", "tiling": TpuTiling(query_block=128, key_block=128, interpret=True)}
    for case, arguments in itertools.islice(cases_of(shape), 6):
        got = compiled(by_lse(shape.window, mask_gradient=mask_gradient, **options), *arguments)
        for x, y in zip(got, expected_of(shape, arguments, mask_gradient), strict=True):
            assert relative_error(x, y) < 2e-5, case


@pytest.mark.skipif(jax.__version_info__[:2] < (0, 11), reason="the GPU interpreter needs jax >= 0.11")
def test_pallas_gpu_equals_the_oracle():
    shape, rng = Shape(2, 131, 1, 2, 64, 5), np.random.default_rng(2)
    q, k, v, weight = inputs(shape, spread=2.0, dtype=jnp.bfloat16)
    end = document_ends("padding", shape, rng)
    arguments = (q, k, v, jax.nn.one_hot(role_ids("random", shape, rng), 3), end, weight)
    options = {"implementation": "pallas_gpu", "tiling": GpuTiling(interpret=True)}
    got = compiled(by_lse(shape.window, **options), *arguments)
    for x, y in zip(got, expected_of(shape, arguments, "exact"), strict=True):
        assert relative_error(x, y) < 1e-2


# --- a sequence that is divided among devices ---


def error_of_divided_sequence(mask_gradient, length):
    """Returns the largest error of values and gradients where the sequence is divided among four devices."""
    mesh = jax.make_mesh((1, 4), ("data", "context"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    shape = Shape(2, length, 4, 2, 8, 5)
    rows, roles = jax.P("data", "context"), jax.P("data", None, "context")

    def attention(q, k, v, roles, end, axis_name=None):
        options = {"mask_gradient": mask_gradient, "sample_key": jax.random.key(3), "axis_name": axis_name}
        return below_sink(
            *na.nats_attention(
                q, k, v, roles, window=shape.window, document_end=end, return_lse=True, implementation="xla", **options
            )
        )

    rng = np.random.default_rng(0)
    q, k, v, weight = inputs(shape, spread=3.0)
    end = jnp.asarray(document_ends("padding", shape, rng))
    arguments = (q, k, v, jax.nn.one_hot(role_ids("random", shape, rng), 3), end, weight)
    specs = (rows, rows, rows, roles, rows)
    divided = jax.shard_map(
        lambda *arrays: attention(*arrays, axis_name="context"), mesh=mesh, in_specs=specs, out_specs=rows
    )
    expected = jax.jit(value_and_gradients, static_argnums=0)(attention, *arguments)
    placed = jax.device_put(arguments, tuple(jax.NamedSharding(mesh, spec) for spec in (*specs, rows)))
    got = jax.jit(value_and_gradients, static_argnums=0)(divided, *placed)
    return max(relative_error(x, y) for x, y in zip(got, expected, strict=True))


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    # A draw whose strata the pieces do not cut is the draw of one device.
    for mask_gradient, length in (("exact", 72), (na.Sampled(0.5), 256)):
        error = error_of_divided_sequence(mask_gradient, length)
        assert error < 1e-5, f"{mask_gradient}: {error}"
    print(f"{jax.device_count()} devices")


def test_a_divided_sequence_gives_what_one_device_gives():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "4 devices\n"


if __name__ == "__main__":
    main()
