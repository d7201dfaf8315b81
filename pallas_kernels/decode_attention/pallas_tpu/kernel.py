"""The kernel: one softmax, accumulated over the blocks of each head.

Key and value of a slot share a row. With head dim 64 the row is one register wide and never taken apart: ``[q | 0]``
times the row is the logit, and the second half of the weighted sum of rows is that of the values. The products have few
rows and wait for each other, so some blocks, of several heads or of one, are computed side by side.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import tpu_lanes as lanes
from pallas_kernels.decode_attention.pallas_tpu.tiers import Tiers

# No logit is lower, and it is finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def kernel(
    layer_ref,
    num_blocks_ref,
    longest_ref,
    position_ref,
    query_ref,
    pairs_ref,
    ends_ref,
    out_ref,
    lse_ref,
    pairs_buffer,
    ends_buffer,
    semaphores,
    state_ref,
    total_ref,
    *,
    scale: float,
) -> None:
    """Computes one sequence, which is a grid step.

    ``query`` and ``out`` are ``[k, rows, columns]``, ``lse`` and ``total`` ``[k, rows, 128]``. Until the end ``out``
    holds weighted sums, ``lse`` maxima, the same in every lane, and ``total`` sums of weights, a part in every lane.
    """
    first = pl.program_id(0) * pl.num_programs(1)
    b = first + pl.program_id(1)
    buffers = (pairs_buffer, ends_buffer)
    end = first + pl.num_programs(1)
    tiers = Tiers(layer_ref[0], end, num_blocks_ref, longest_ref, (pairs_ref, ends_ref), buffers, semaphores, state_ref)

    pl.when(b == first)(lambda: tiers.begin(b))
    position, (_, rows, columns) = position_ref[b], query_ref.shape
    out_ref[...] = jnp.zeros_like(out_ref)
    lse_ref[...] = jnp.full_like(lse_ref, _LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)

    def visit(start, pairs, key_end):
        depth, heads = pairs.shape[:2]
        these = pl.ds(start, heads)

        def load(ref):
            return ref[these].reshape(heads * rows, -1)

        def store(ref, x):
            ref[these] = x.reshape(heads, rows, -1)

        def by_block(x):
            return x.reshape(depth, heads * rows, -1)

        keys, values = _halves(pairs, columns, query_ref.dtype)
        logits = scale * _dot(jnp.concatenate([query_ref[these]] * depth), keys, 2)
        key_end = jnp.concatenate([jnp.broadcast_to(row, logits.shape[1:]) for row in key_end])
        logits = by_block(jnp.where(position < key_end, logits.reshape(key_end.shape), -jnp.inf))
        highest = jnp.max(logits, axis=2, keepdims=True)
        top = load(lse_ref)
        new_top = jnp.maximum(top, jnp.max(highest, axis=0))
        weights = jnp.exp(logits - lanes.spread(new_top, logits.shape[2])[None])
        decay = jnp.exp(top - new_top)
        update = by_block(_dot(weights.reshape(depth * heads, rows, -1).astype(values.dtype), values, 1))
        # The memory of a missing block may never have been written: 0 times NaN.
        update = jnp.sum(jnp.where(highest > -jnp.inf, update, 0), axis=0)
        store(lse_ref, new_top)
        store(total_ref, load(total_ref) * decay + lanes.fold_lanes(jnp.sum(weights, axis=0)))
        store(out_ref, load(out_ref) * lanes.spread(decay, columns) + update)

    tiers.for_each(b, visit)

    total = jnp.sum(total_ref[...], axis=-1, keepdims=True)
    out_ref[...] = out_ref[...] / jnp.where(total == 0, 1, total)
    lse_ref[...] = jnp.where(total == 0, -jnp.inf, lse_ref[...] + jnp.log(total))


def _halves(pairs, columns: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the operands for keys and values ``[blocks, u, columns]``: slices of the rows, or twice the rows."""
    both = pairs[...].reshape(-1, *pairs.shape[2:]).astype(dtype)
    if both.shape[-1] == columns:
        return both, both
    return both[..., :columns], both[..., columns:]


def _dot(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
    """Multiplies ``x [blocks, m, s]`` by ``y``, whose axis ``y_axis`` is s, in float32."""
    # One pass of bfloat16 is not what a caller with float32 arrays asks for.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((2,), (y_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
