"""Padding to whole tiles, and heads put into lanes: what the passes of this backend share.

Axis letters: ``b`` batch, ``k`` KV head, ``g`` query heads per KV head, ``t`` query, ``s`` key, ``h`` head dim;
``n`` group of lanes, ``p`` lane (``n · p = b · k``), ``m`` row of a tile (``g`` times the query block).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import LiveBlocks, Tiles, live_blocks
from pallas_kernels.nats_attention.roles import NO_END


def pad(x: jax.Array, axis: int, block: int, value) -> jax.Array:
    """``x`` lengthened along ``axis`` to a multiple of ``block``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def pad_intervals(intervals: Intervals, query_block: int, key_block: int) -> Intervals:
    """Padded rows read nothing and padded keys are read by none."""
    return Intervals(
        pad(intervals.query_position, 1, query_block, -1),
        pad(intervals.key_position, 2, key_block, NO_END),
        pad(intervals.key_end, 2, key_block, 0),
    )


def num_lanes(lanes: int, heads: int) -> int:
    """The largest divisor of ``heads`` that is at most ``lanes``."""
    return max(n for n in range(1, min(lanes, heads) + 1) if heads % n == 0)


def in_lanes(x: jax.Array, lanes: int) -> jax.Array:
    """``[b, k, …]`` → ``[n, p, …]``."""
    return x.reshape(-1, lanes, *x.shape[2:])


def interval_lanes(intervals: Intervals, lanes: int) -> Intervals:
    """The intervals by lane: int32 ``[n, p, t]`` and ``[n, p, s]`` twice."""
    at = intervals.query_position[:, None]
    at = jnp.broadcast_to(at, (*intervals.key_end.shape[:2], at.shape[-1]))
    return Intervals(*(in_lanes(x, lanes) for x in (at, intervals.key_position, intervals.key_end)))


def lists_in_lanes(tiles: Tiles, lanes: int) -> LiveBlocks:
    """One list for the lanes of a group: alive where any lane is, plain where all lanes are; ``[n, q, j]``."""
    alive, plain = (in_lanes(x, lanes) for x in tiles)
    return live_blocks(Tiles(jnp.any(alive, axis=1), jnp.all(plain, axis=1)))


def block_of(x: jax.Array, index, block: int, axis: int = 1) -> jax.Array:
    """The ``index``-th block along ``axis``."""
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def add_to_block(x: jax.Array, update: jax.Array, index, axis: int = 1) -> jax.Array:
    """``x`` with ``update`` added to its ``index``-th block along ``axis``."""
    start = index * update.shape[axis]
    old = jax.lax.dynamic_slice_in_dim(x, start, update.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, axis)


def rows_of(x: jax.Array, index, block: int) -> jax.Array:
    """A query block of ``x [p, g, t, …]`` with the group folded into the rows: ``[p, m, …]``."""
    part = block_of(x, index, block, 2)
    return part.reshape(part.shape[0], -1, *part.shape[3:])


def visible_pairs(intervals: Intervals, i, j, query_block: int, key_block: int) -> jax.Array:
    """The mask of tile (i, j), bool ``[p, query_block, key_block]``; ``intervals`` of one group of lanes."""
    at = block_of(intervals.query_position, i, query_block)[:, :, None]
    begin, end = (block_of(x, j, key_block)[:, None, :] for x in intervals[1:])
    return (begin <= at) & (at < end)


def hide(x: jax.Array, visible: jax.Array, value) -> jax.Array:
    """``x [p, m, s]`` with ``value`` where ``visible [p, query_block, s]`` is false, in every head of the group."""
    by_head = x.reshape(x.shape[0], -1, *visible.shape[1:])
    return jnp.where(visible[:, None], by_head, value).reshape(x.shape)


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``einsum`` with a float32 result."""

    def product(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    def wide_product(x, y):
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    if x.dtype == y.dtype == jnp.float32:
        return product(x, y)
    # XLA's CPU products of narrow operands refuse a float32 result for some orders of the axes.
    return jax.lax.platform_dependent(x, y, cpu=wide_product, default=product)
