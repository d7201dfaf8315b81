"""The attention backends, and their comparison with the dense oracle: inputs, values, gradients, errors as numbers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Placed, Shape, any_places, document_ends, role_ids

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention.pallas_gpu import GpuTiling
from pallas_kernels.nats_attention.pallas_tpu import TpuTiling
from pallas_kernels.nats_attention.tiling import Problem

gpu_interpreter = pytest.mark.skipif(
    jax.__version_info__[:2] < (0, 11), reason=f"the GPU interpreter needs jax >= 0.11; this is {jax.__version__}"
)


class Backend(NamedTuple):
    """What a backend computes in, and how far it may be from the oracle of the same rounded numbers."""

    dtype: jnp.dtype = jnp.dtype("float32")
    spread: float = 3.0
    """Of the queries."""
    tolerance: float = 2e-5
    loud: float = 400.0
    """What a key is multiplied by for it to be louder than all others."""
    loud_tolerance: float = 1e-4
    """Queries that do read such a key have logits near 1000, which float32 rounds to 5e-5."""


BACKENDS = {
    "xla": Backend(),
    "reference": Backend(),
    "pallas_tpu": Backend(loud=100.0),
    # The weights, the gradients of the logits and the results are rounded.
    "pallas_gpu": Backend(jnp.dtype("bfloat16"), spread=2.0, tolerance=1e-2, loud_tolerance=1e-2),
}
# In Pallas' interpreters.
TPU_IN_PLACE = TpuTiling(query_block=128, key_block=128, interpret=True)
TPU_GATHERED = TpuTiling(query_block=128, key_block=128, thresholds=(128,), interpret=True)
GPU_IN_PLACE = GpuTiling(interpret=True)
GPU_GATHERED = GpuTiling(columns=64, rows=64, thresholds=(128,), interpret=True)
PROBLEM = Problem(batch=1, queries=4096, keys=4096, num_kv_heads=2, group=4, head_dim=64, window=64, dtype="bfloat16")
DOCUMENTS = ("one", "packed", "padding")


def inputs(shape: Shape, seed=0, dtype=jnp.float32, spread=1.0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(shape.b, shape.length, shape.k * shape.g, shape.h)) * spread
    k, v = rng.normal(size=(2, shape.b, shape.length, shape.k, shape.h))
    weight = rng.normal(size=q.shape)
    return [jnp.asarray(x, dtype) for x in (q, k, v, weight)]


def arguments_of(shape, patterns, rng, **options):
    """Returns ``(q, k, v, roles, document_end, weight)``, ``shape.b`` sequences for each (roles, documents).

    Several patterns share a call, because what takes time in an interpreter is each kernel anew.
    """
    q, k, v, weight = inputs(shape._replace(b=shape.b * len(patterns)), **options)
    drawn = [(role_ids(roles, shape, rng), document_ends(documents, shape, rng)) for roles, documents in patterns]
    ids, ends = zip(*drawn, strict=True)
    end = None if ends[0] is None else np.concatenate(ends)
    return q, k, v, jax.nn.one_hot(np.concatenate(ids), shape.num_roles), end, weight


def value_and_gradients(attention, *arguments):
    """Returns ``(out, dq, dk, dv, droles)``; ``attention(q, k, v, roles, document_end)``, then the loss weights."""

    def loss(q, k, v, roles, document_end, weight):
        out = attention(q, k, v, roles, document_end)
        return jnp.sum(out.astype(weight.dtype) * weight), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
    return out, *gradients


# One compilation serves every role pattern: the roles and the documents are data.
compiled = jax.jit(value_and_gradients, static_argnums=0)


@functools.cache
def nats(window, **options):
    return lambda q, k, v, roles, end: na.nats_attention(q, k, v, roles, window=window, document_end=end, **options)


@functools.cache
def sampled(window, fraction, seed, **options):
    """``nats`` with a sampled gradient; the key is made in the call, for keys have no hash under every jax."""

    def attention(q, k, v, roles, end):
        gradient = {"mask_gradient": na.Sampled(fraction), "sample_key": jax.random.key(seed)}
        return na.nats_attention(q, k, v, roles, window=window, document_end=end, **gradient, **options)

    return attention


def oracle(window, arguments, mask_gradient="exact"):
    """Returns ``value_and_gradients`` of the dense reference in float64."""
    with jax.enable_x64(True):
        wide = [x if x is None or x.dtype == np.int32 else np.asarray(x, np.float64) for x in arguments]
        return compiled(nats(window, mask_gradient=mask_gradient, implementation="reference"), *wide)


def interval(implementation, tiling=None, **options):
    """Returns ``attention(query, key, value, places)``, which gives values and log-sum-exp."""

    def attention(query, key, value, places):
        return na.interval_attention(
            query,
            key,
            value,
            places.key_end,
            query_position=places.query_position,
            key_position=places.key_position,
            return_lse=True,
            implementation=implementation,
            tiling=tiling,
            **options,
        )

    return attention


def relative_error(got, expected):
    """Returns the largest error over the largest expected value, or over 0.05 where that is larger.

    A gradient can be exactly 0 (every query reads its own key alone). What float32 leaves there is the rounding of
    ``dp - delta``, a difference of two numbers of order 1: some 1e-7, and 0 on one CPU but not on another.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / max(0.05, np.abs(expected).max())


class Call(NamedTuple):
    """Arguments of ``interval_attention`` and gradients of its results; NumPy arrays."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    places: Placed
    dout: np.ndarray
    dlse: np.ndarray


def any_call(b, t, s, k, g, h, seed, broken=np.nan) -> Call:
    """Draws a call in which all that is not read, and its gradients, are ``broken``."""
    rng = np.random.default_rng(seed)
    places = any_places(b, t, s, k, rng)
    query, dout = rng.normal(size=(2, b, t, k * g, h))
    key, value = rng.normal(size=(2, b, s, k, h))
    at, begin, end = (x.astype(np.int64) for x in places)
    first, last = at.min(1)[:, None, None], at.max(1)[:, None, None]
    unread = np.moveaxis((end <= begin) | (end <= first) | (begin > last), 1, 2)[..., None]
    idle = np.repeat(np.moveaxis(~places.visible.any(-1), 1, 2), g, axis=2)
    key, value = (np.where(unread, broken, x) for x in (key, value))
    query, dout = (np.where(idle[..., None], broken, x) for x in (2 * query, dout))
    dlse = np.where(idle, broken, rng.normal(size=idle.shape))
    return Call(*(x.astype(np.float32) for x in (query, key, value)), places, *map(np.float32, (dout, dlse)))


def ragged_call(b, t, s, k, g, h, seed) -> Call:
    """Draws a call with gaps between ordered keys, and queries among or before them; number 5 reads nothing."""
    rng = np.random.default_rng(seed)
    query, dout = rng.normal(size=(2, b, t, k * g, h))
    key, value = rng.normal(size=(2, b, s, k, h))
    position = np.sort([[rng.permutation(2 * s)[:s] for _ in range(k)] for _ in range(b)], axis=-1)
    at = rng.integers(-1, 2 * s, (b, t))
    at[:, 5] = -1
    places = Placed(*(x.astype(np.int32) for x in (at, position, position + rng.integers(0, 40, (b, k, s)))))
    return Call(*map(np.float32, (query, key, value)), places, *map(np.float32, (dout, rng.normal(size=(b, t, k * g)))))


def narrowed(call: Call, dtype) -> tuple[Call, Call]:
    """Returns the call with floats in ``dtype``, and the same rounded numbers in float32."""
    names = ("query", "key", "value", "dout")
    narrow = {name: jnp.asarray(getattr(call, name), dtype) for name in names}
    return call._replace(**narrow), call._replace(**{name: np.asarray(x, np.float32) for name, x in narrow.items()})


def results(attention, call: Call):
    """Returns ``(out, lse, dquery, dkey, dvalue)`` of ``attention(query, key, value, places)``."""
    attend = functools.partial(attention, places=call.places)
    (out, lse), pullback = jax.vjp(attend, call.query, call.key, call.value)
    return out, lse, *pullback((call.dout.astype(out.dtype), call.dlse.astype(lse.dtype)))


def expected_results(call: Call, scale: float):
    """Returns ``results`` by the definition, in NumPy and float64, with gradients written out."""
    visible = call.places.visible[:, :, None]
    b, k, _, t, _ = visible.shape
    reads, is_read = visible.any(-1), np.moveaxis(visible.any((2, 3)), 1, 2)[..., None]

    def by_row(x):  # [b, t, n, …] → [b, k, g, t, …], 0 where nothing is read
        x = np.moveaxis(x.astype(np.float64).reshape(b, t, k, -1, *x.shape[3:]), 1, 3)
        return np.where(reads[..., None] if x.ndim == 5 else reads, x, 0)

    def by_query(x):
        return np.moveaxis(x, 3, 1).reshape(b, t, -1, *x.shape[4:])

    query, dout, dlse = (by_row(x) for x in (call.query, call.dout, call.dlse))
    key, value = (np.where(is_read, x.astype(np.float64), 0) for x in (call.key, call.value))
    logits = np.where(visible, scale * np.einsum("bkgth,bskh->bkgts", query, key), -np.inf)
    top = np.where(reads, logits.max(-1), 0)
    total = np.exp(logits - top[..., None]).sum(-1)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    weights = np.exp(logits - np.where(reads, lse, 0)[..., None])
    out = np.einsum("bkgts,bskh->bkgth", weights, value)
    dweights = np.einsum("bkgth,bskh->bkgts", dout, value)
    dlogits = weights * (dweights - (dout * out).sum(-1)[..., None] + dlse[..., None])
    dquery = scale * np.einsum("bkgts,bskh->bkgth", dlogits, key)
    dkey = scale * np.einsum("bkgts,bkgth->bskh", dlogits, query)
    return by_query(out), by_query(lse), by_query(dquery), dkey, np.einsum("bkgts,bkgth->bskh", weights, dout)


def worst_error(got, expected) -> float:
    """Returns the largest ``relative_error`` of ``results``; −∞ has to be where it is expected."""
    errors = []
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.isneginf(np.asarray(x, np.float32)), np.isneginf(y))
        rows = np.isfinite(y)
        errors.append(relative_error(np.asarray(x, np.float64)[rows], y[rows]) if rows.any() else 0.0)
    return float(np.max(errors))  # NaN too
