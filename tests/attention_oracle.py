"""How a backend is compared with the dense oracle: inputs, values and every gradient, one number for the error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import Shape

from pallas_kernels import nats_attention as na

DOCUMENTS = ("one", "packed", "padding")


def inputs(shape: Shape, seed=0, dtype=jnp.float32, spread=1.0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(shape.b, shape.length, shape.k * shape.g, shape.h)) * spread
    k, v = rng.normal(size=(2, shape.b, shape.length, shape.k, shape.h))
    weight = rng.normal(size=q.shape)
    return [jnp.asarray(x, dtype) for x in (q, k, v, weight)]


def value_and_gradients(attention, *arguments):
    """``(out, dq, dk, dv, droles)`` in float64; ``attention(q, k, v, roles, document_end)``, then the loss weights."""

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


def relative_error(got, expected):
    """Largest error over the largest expected value, or over 0.05 where that is larger.

    A gradient can be exactly 0 (every query reads its own key alone). What float32 leaves there is the rounding of
    ``dp - delta``, a difference of two numbers of order 1: some 1e-7, and 0 on one CPU but not on another.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / max(0.05, np.abs(expected).max())
