"""The edges of what the attention promises: any int32 as position and end, nothing to read, nothing at all, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import (
    BACKENDS,
    GPU_GATHERED,
    GPU_IN_PLACE,
    PROBLEM,
    TPU_IN_PLACE,
    any_call,
    arguments_of,
    compiled,
    expected_results,
    gpu_interpreter,
    inputs,
    interval,
    narrowed,
    nats,
    oracle,
    ragged_call,
    relative_error,
    results,
    sampled,
    worst_error,
)
from cases import Shape, role_ids

from pallas_kernels import nats_attention as na
from pallas_kernels.decode_attention import observed_attention
from pallas_kernels.nats_attention import pallas_gpu, pallas_tpu
from pallas_kernels.nats_attention.pallas_gpu import GpuTiling
from pallas_kernels.nats_attention.pallas_tpu import TpuTiling
from pallas_kernels.nats_attention.xla import XlaTiling

SMALL = XlaTiling(query_block=3, key_block=4, thresholds=(2,), lanes=3)
TPU = TpuTiling(query_block=128, key_block=128, thresholds=(2,), interpret=True)


@pytest.mark.parametrize(
    ("implementation", "tiling", "sizes"),
    [
        ("xla", None, (2, 7, 33, 2, 2, 8)),
        ("reference", None, (2, 7, 33, 2, 2, 8)),
        ("pallas_tpu", TPU_IN_PLACE, (2, 133, 260, 2, 2, 64)),
        pytest.param("pallas_gpu", GPU_IN_PLACE, (2, 7, 100, 2, 2, 64), marks=gpu_interpreter),
    ],
)
def test_positions_and_log_sum_exp(implementation, tiling, sizes):
    """Gathered keys and ragged queries, rows that read nothing, gradients through the log-sum-exp too."""
    backend = BACKENDS[implementation]
    call, wide = narrowed(ragged_call(*sizes, 5), backend.dtype)
    got = jax.jit(functools.partial(results, interval(implementation, tiling)))(call)
    expected = expected_results(wide, sizes[-1] ** -0.5)
    assert np.isneginf(got[1][:, 5]).all()
    assert not np.asarray(got[0][:, 5], np.float32).any()
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
    assert worst_error(got, expected) < (5e-6 if backend.dtype == jnp.float32 else backend.tolerance)


@pytest.mark.parametrize(
    ("implementation", "tiling", "sizes", "draws"),
    [
        ("xla", SMALL, (8, 13, 21, 2, 2, 4), 20),
        ("xla", SMALL, (8, 1, 1, 1, 1, 4), 8),
        ("xla", None, (8, 13, 21, 2, 2, 4), 8),
        ("reference", None, (8, 13, 21, 2, 2, 4), 8),
        ("pallas_tpu", TPU, (4, 5, 133, 1, 2, 64), 4),
        pytest.param("pallas_gpu", GPU_GATHERED, (6, 5, 100, 1, 2, 64), 1, marks=gpu_interpreter),
    ],
)
def test_any_positions_and_ends_and_nan_where_nothing_is_read(implementation, tiling, sizes, draws):
    backend = BACKENDS[implementation]
    run = jax.jit(functools.partial(results, interval(implementation, tiling)))
    for seed in range(draws):
        call, wide = narrowed(any_call(*sizes, seed, broken=(np.nan, np.inf, 0)[seed % 3]), backend.dtype)
        assert worst_error(run(call), expected_results(wide, sizes[-1] ** -0.5)) < backend.tolerance, seed


def test_under_vmap_it_is_the_same():
    call = any_call(6, 5, 9, 2, 1, 4, 0)
    alone = jax.tree.map(lambda x: x[:, None], call)
    got = jax.jit(jax.vmap(functools.partial(results, interval("xla", SMALL))))(alone)
    assert worst_error([x[:, 0] for x in got], expected_results(call, 0.5)) < 2e-5


@pytest.mark.parametrize("scale", [1e-37, 1e30])
def test_a_tiny_and_a_huge_scale(scale):
    """Weights are equal, or all is for one key: with a logit of -1e30 as readily as with one of 1e30."""
    q = jnp.ones((1, 2, 1, 4))
    k = jnp.stack([jnp.full((1, 1, 4), x) for x in (-3.0, -2.0)], axis=1)
    v = jnp.stack([jnp.full((1, 1, 4), x) for x in (1.0, 2.0)], axis=1)
    out, lse = na.interval_attention(q, k, v, jnp.full((1, 1, 2), na.NO_END), scale=scale, return_lse=True)
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 1.5 if scale < 1 else 2])
    np.testing.assert_allclose(lse[0, :, 0], [-12 * scale, np.log(2) if scale < 1 else -8 * scale], rtol=1e-6)


@pytest.mark.parametrize("empty", [(0, 3, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 3, 0, 4), (0, 0, 0, 0, 4)])
@pytest.mark.parametrize("implementation", [None, "reference", "pallas_tpu"])
def test_nothing_to_read_or_to_be_read_by(empty, implementation):
    b, t, s, k, h = empty
    q, key = jnp.ones((b, t, 2 * k, h), jnp.bfloat16), jnp.ones((b, s, k, h), jnp.bfloat16)

    def attend(q, key):
        end = jnp.zeros((b, k, s), jnp.int32)
        return na.interval_attention(q, key, key, end, return_lse=True, implementation=implementation)

    (out, lse), pullback = jax.vjp(attend, q, key)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], jnp.float32)
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()
    assert not any(np.asarray(x, np.float32).any() for x in pullback((out + 1, lse)))
    if s == t:
        roles = jnp.zeros((b, k, t, 3))
        out = na.nats_attention(q, key, key, roles, window=1, implementation=implementation)
        assert out.shape == q.shape
    observed = jnp.zeros((b, t), bool)
    positions = {"query_position": jnp.zeros((b, t), int), "key_position": jnp.zeros((b, k, s), int)}
    if k:
        out, attention_sum = observed_attention(q, key, key, jnp.zeros((b, k, s), int), observed=observed, **positions)
        assert (out.shape, attention_sum.shape) == (q.shape, (b, k, s))


def test_integers_beyond_int32_do_not_wrap_around():
    shape = (1, 2, 1, 4)
    q = k = v = jnp.ones(shape).at[:, 1].set(2)
    expected = na.interval_attention(q, k, v, jnp.full((1, 1, 2), na.NO_END, jnp.int32))
    far = np.full((1, 1, 2), 2**40)  # as int32 that is 0
    np.testing.assert_array_equal(na.interval_attention(q, k, v, far), expected)
    np.testing.assert_array_equal(na.interval_attention(q, k, v, far.astype(np.uint64)), expected)
    np.testing.assert_array_equal(na.nats_attention(q, k, v, jnp.eye(3)[None, None, :2], window=2**40), expected)
    assert not np.asarray(na.interval_attention(q, k, v, -far)).any()
    assert not np.asarray(na.interval_attention(q, k, v, far, query_position=np.full((1, 2), 2**40))).any()
    assert not np.asarray(na.interval_attention(q, k, v, far, query_position=np.full((1, 2), -(2**40)))).any()
    with jax.enable_x64(True):
        wide = na.interval_attention(q, k, v, jnp.asarray(far), query_position=jnp.arange(2)[None])
    np.testing.assert_array_equal(wide, expected)


@pytest.mark.parametrize(
    "dtypes", [("float16",) * 3, ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float16")]
)
@pytest.mark.parametrize(("implementation", "tiling"), [("xla", SMALL), ("pallas_tpu", TPU), ("reference", None)])
def test_narrow_and_mixed_dtypes(dtypes, implementation, tiling):
    call = any_call(4, 5, 21, 1, 2, 4, 3)
    arrays = [jnp.asarray(x, dtype) for x, dtype in zip(call[:3], dtypes, strict=True)]
    call = call._replace(**dict(zip(("query", "key", "value"), arrays, strict=True)))
    run = jax.jit(functools.partial(results, interval(implementation, tiling)))
    if implementation == "pallas_tpu" and dtypes == ("float16",) * 3:
        with pytest.raises(NotImplementedError, match="float16 is not a dtype of its kernels"):
            run(call)
        return
    got = run(call)
    assert [x.dtype.name for x in got] == [dtypes[0], "float32", *dtypes]
    wide = call._replace(**{name: np.asarray(getattr(call, name), np.float32) for name in ("query", "key", "value")})
    assert worst_error(got, expected_results(wide, 0.5)) < 3e-2


def test_float64_is_taken_and_computed_in_float32():
    call = any_call(4, 5, 9, 1, 2, 4, 5)
    with jax.enable_x64(True):
        wide = call._replace(**{name: np.float64(getattr(call, name)) for name in ("query", "key", "value", "dout")})
        got = jax.jit(functools.partial(results, interval("xla", SMALL)))(wide)
    assert [x.dtype.name for x in got] == ["float64", "float32", *["float64"] * 3]
    assert worst_error(got, expected_results(call, 0.5)) < 2e-5


@pytest.mark.parametrize(("implementation", "tiling"), [("xla", SMALL), ("pallas_tpu", TPU)])
def test_ends_of_documents_that_contradict_each_other(implementation, tiling):
    """``document_end`` is each key's own bound, whatever its neighbors say; padding holds NaN."""
    shape = Shape(4, 21, 2, 1, 4, 3)
    rng = np.random.default_rng(0)
    q, k, v, weight = inputs(shape)
    for _ in range(4):
        roles = jax.nn.one_hot(role_ids("random", shape, rng), 3)
        end = rng.choice([-(2**31), -1, 0, 5, 9, 13, 21, 50, 2**31 - 1], (shape.b, shape.length)).astype(np.int32)
        end[0] = np.repeat([4, 4, 0, 12, 12, 12, 21], 3)  # padding before, between and behind documents
        padding = jnp.asarray(end <= np.arange(shape.length))[..., None, None]
        broken = [jnp.where(padding, jnp.nan, x) for x in (k, v)]
        got = compiled(nats(shape.window, implementation=implementation, tiling=tiling), q, *broken, roles, end, weight)
        clean = [jnp.where(padding, 0, x) for x in (k, v)]
        expected = oracle(shape.window, (q, *clean, roles, end, weight))
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x, y) < 2e-5


def test_rows_of_padding_may_hold_nan_and_get_nothing():
    """Forward and backward, and the gradients of all others are what they would be."""
    shape, used = Shape(1, 24, 2, 2, 4, 2), 17
    rng = np.random.default_rng(1)
    roles = jax.nn.one_hot(role_ids("random", shape, rng), 3)
    end = jnp.where(jnp.arange(shape.length) < used, used, 0)[None]
    whole = inputs(shape)
    broken = [x.at[:, used:].set(jnp.nan) for x in whole]
    run = nats(shape.window, implementation="xla", tiling=SMALL)

    def gradients(q, k, v, weight):
        out, pullback = jax.vjp(lambda *a: run(*a, end), q, k, v, roles)
        return out, *pullback(weight)

    for got, expected in zip(jax.jit(gradients)(*broken), jax.jit(gradients)(*whole), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("fraction", [0, 1.5, -1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        na.Sampled(fraction)


def test_all_rows_sampled_are_all_rows():
    shape = Shape(1, 9, 1, 1, 4, 2)
    arguments = arguments_of(shape, [("random", "one")], np.random.default_rng(0))
    for x, y in zip(*(compiled(f, *arguments) for f in (sampled(2, 1, 0), nats(2))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_end": jnp.zeros((1, 1, 3))}, "key_end has dtype float32"),
        ({"key_end": jnp.zeros((1, 1, 3), bool)}, "key_end has dtype bool"),
        ({"query_position": jnp.zeros((1, 3))}, "query_position has dtype float32"),
        ({"key_position": jnp.zeros((1, 3), int)}, "key_position has shape"),
        ({"query": jnp.zeros((1, 3, 2, 4), int)}, "query has dtype int32"),
        ({"value": jnp.zeros((1, 3, 1, 4), complex)}, "value has dtype complex64"),
        ({"query": jnp.zeros((1, 3, 3, 4)), "key": jnp.zeros((1, 3, 2, 4))}, "value"),
        ({name: jnp.zeros((1, 3, 1, 0)) for name in ("query", "key", "value")}, "head dim 0"),
        ({"key": jnp.zeros((1, 3, 0, 4)), "value": jnp.zeros((1, 3, 0, 4))}, "among 0 KV heads"),
        ({"scale": -1}, "scale=-1"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": 1e-46}, "scale=1e-46"),
        ({"scale": 1e39}, "scale=1e.39"),
        ({"scale": "big"}, "scale=big"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(change, message):
    query, key, value = jnp.zeros((1, 3, 2, 4)), jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 3, 1, 4))
    call = {"query": query, "key": key, "value": value, "key_end": jnp.zeros((1, 1, 3), int)} | change
    with pytest.raises(ValueError, match=message):
        na.interval_attention(**call)


@pytest.mark.parametrize("window", [-1, 2.5, "4", None])
def test_a_window_that_is_none_is_refused(window):
    q = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match=f"window={window}"):
        na.nats_attention(q, q, q, jnp.zeros((1, 1, 3, 3)), window=window)
    with pytest.raises(ValueError, match=f"window={window}"):
        na.key_end_from_roles(jnp.zeros((1, 1, 3), int), window=window)


def test_what_is_known_only_when_the_program_runs_is_refused_where_it_must_be_known_before():
    q = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="scale="):
        jax.jit(lambda scale: na.interval_attention(q, q, q, jnp.zeros((1, 1, 3), int), scale=scale))(1.0)
    with pytest.raises(ValueError, match="window="):
        jax.jit(lambda window: na.nats_attention(q, q, q, jnp.zeros((1, 1, 3, 3)), window=window))(1)


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        (pallas_tpu, {"dtype": "float16"}, "float16"),
        (pallas_tpu, {"head_dim": 320}, "head dim 320"),
        (pallas_tpu, {"group": 128}, "128 query heads"),
        pytest.param(pallas_gpu, {"dtype": "float32"}, "float32 is not", marks=gpu_interpreter),
        pytest.param(pallas_gpu, {"head_dim": 96}, "head dim 96", marks=gpu_interpreter),
        pytest.param(pallas_gpu, {}, "Hopper", marks=gpu_interpreter),
    ],
)
def test_what_a_backend_cannot_serve_is_refused_with_the_reason(backend, change, reason):
    problem = PROBLEM._replace(**change)
    with pytest.raises(NotImplementedError, match=reason):
        backend.check(problem, backend.default_tiling(problem))


WHOLE = XlaTiling(query_block=128, key_block=128)


@pytest.mark.parametrize(
    ("backend", "tiling", "message"),
    [
        (pallas_tpu, WHOLE, "takes a TpuTiling"),
        (pallas_tpu, TpuTiling(query_block=64, key_block=128), "query_block=64"),
        (pallas_tpu, TpuTiling(query_block=128, key_block=200), "key_block=200"),
        (pallas_tpu, TpuTiling(query_block=4096, key_block=512), "vector memory"),
        pytest.param(pallas_gpu, WHOLE, "takes a GpuTiling", marks=gpu_interpreter),
        pytest.param(pallas_gpu, GpuTiling(query_block=64), "query_block=64", marks=gpu_interpreter),
        pytest.param(pallas_gpu, GpuTiling(key_block=256), "key_block=256", marks=gpu_interpreter),
        pytest.param(pallas_gpu, GpuTiling(columns=96), "columns=96", marks=gpu_interpreter),
        pytest.param(pallas_gpu, GpuTiling(rows=32), "rows=32", marks=gpu_interpreter),
        pytest.param(pallas_gpu, GpuTiling(stages=9), "stages=9", marks=gpu_interpreter),
    ],
)
def test_a_wrong_tiling_is_named(backend, tiling, message):
    with pytest.raises(ValueError, match=message):
        backend.check(PROBLEM, tiling)


@pytest.mark.parametrize("tiling", [TPU, GPU_GATHERED])
def test_without_a_name_a_cpu_takes_no_backend_of_another_device(tiling):
    q, k, v, _ = inputs(Shape(1, 4, 1, 1, 4, 1))
    with pytest.raises(ValueError, match="XlaTiling"):
        na.nats_attention(q, k, v, jnp.zeros((1, 1, 4, 3)), window=1, tiling=tiling)
