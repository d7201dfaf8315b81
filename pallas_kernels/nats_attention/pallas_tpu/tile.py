"""Arithmetic on one tile, in registers: products, masks and sums.

The rows of a tile are what a grid step owns, the columns what it walks through. So the streamed numbers are used
as they come, one a lane, and the owned ones are turned into columns once a grid step.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry


def _dot(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
    # One pass of bfloat16 is not what a caller with float32 arrays asks for.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes ``x [m, s] · y [s, h]``, float32."""
    return _dot(x, y, 0)


def dot_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes ``x [m, h] · y [s, h]ᵀ``, float32."""
    return _dot(x, y, 1)


def rows_of(ref, columns: slice = slice(None)) -> jax.Array:
    """Folds all axes of a block ``[…, h]`` before the last into rows, without a copy, and slices its columns."""
    x = ref[..., columns]
    return x.reshape(-1, x.shape[-1])


def halves(pair_ref, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Returns the operands for the arrays of a pair: slices, or twice the whole if they share a register."""
    if geometry.shared:
        both = rows_of(pair_ref)
        return both, both
    return rows_of(pair_ref, slice(None, geometry.half)), rows_of(pair_ref, slice(geometry.half, None))


def operands(pair_ref, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Returns both arrays of a pair, with zeros for the other array if they share a register."""
    if not geometry.shared:
        return halves(pair_ref, geometry)
    both = rows_of(pair_ref).astype(jnp.float32)
    in_first = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1) < geometry.half
    first, second = jnp.where(in_first, both, 0), jnp.where(in_first, 0, both)
    return first.astype(pair_ref.dtype), second.astype(pair_ref.dtype)


def write_pair(pair_ref, first: jax.Array, second: jax.Array, geometry: Geometry) -> None:
    """Writes products with the first and with the second array as a pair."""
    if geometry.shared:
        in_first = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1) < geometry.half
        pair_ref[...] = jnp.where(in_first, first, second).astype(pair_ref.dtype)
    else:
        pair_ref[:, : geometry.half] = first.astype(pair_ref.dtype)
        pair_ref[:, geometry.half :] = second.astype(pair_ref.dtype)


def as_float(bits: jax.Array) -> jax.Array:
    """Converts the bits of float32."""
    return pltpu.bitcast(bits, jnp.float32)


def bias(where: jax.Array) -> jax.Array:
    """Returns what is added to a logit: 0 for pairs that count and −∞ for others."""
    return jnp.where(where, 0.0, -jnp.inf)


def add_by_head(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Adds ``mask [query_block, s]`` to ``x [m, s]`` in every head of the group."""
    by_head = x.reshape(-1, *mask.shape)
    return (by_head + mask[None]).reshape(x.shape)


def keep_by_head(x: jax.Array, where: jax.Array) -> jax.Array:
    """Keeps ``x [m, s]`` where bool ``where [query_block, s]`` holds, in every head; else −∞, also for NaN."""
    by_head = x.reshape(-1, *where.shape)
    return jnp.where(where[None], by_head, -jnp.inf).reshape(x.shape)


def sum_heads(x: jax.Array, query_block: int) -> jax.Array:
    """Sums ``[m, s]`` over the heads to ``[query_block, s]``."""
    return jnp.sum(x.reshape(-1, query_block, x.shape[1]), axis=0)
