"""The list of blocks that a grid step walks through, cut into segments by what has to be asked in a tile.

A list is one row of int32: where each segment ends, then the blocks in order. All segments of a row are one stream of
copies; only the arithmetic changes from one to the next.

Axis letters: ``b`` batch, ``k`` KV head, ``q`` query block, ``j`` key block.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import Tiles, first_query, last_query, least, most
from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry
from pallas_kernels.nats_attention.roles import NEVER, NO_END, RoleColumns

PLAIN, MASKED, SUMMED = 0, 1, 2
"""Segments: every pair counts; some do; some do, and the role sums ask about single ones."""
NUM_SEGMENTS = 3


def block_lists(tiles: Tiles, summed: jax.Array | None) -> jax.Array:
    """Builds lists along the last axis.

    Args:
      tiles: bool ``[b, k, q, j]`` (or with the last two axes swapped).
      summed: of the same shape (or one that broadcasts to it), tiles that the role sums ask about; None: no tile.

    Returns:
      int32 ``[b, k, q, 1, NUM_SEGMENTS + j]``.
    """
    alive, plain = tiles
    state = jnp.where(plain, PLAIN, MASKED)
    if summed is not None:
        state = jnp.where(summed, SUMMED, state)
    state = jnp.where(alive, state, NUM_SEGMENTS)
    order = jnp.argsort(state, axis=-1, stable=True).astype(jnp.int32)
    ends = [jnp.sum(state <= segment, axis=-1, keepdims=True, dtype=jnp.int32) for segment in range(NUM_SEGMENTS)]
    return jnp.concatenate([*ends, order], axis=-1)[:, :, :, None]


def transposed(tiles: Tiles) -> Tiles:
    """Transposes ``[b, k, q, j]`` to ``[b, k, j, q]``."""
    return Tiles(*(jnp.swapaxes(x, 2, 3) for x in tiles))


def with_local_keys(intervals: Intervals, is_local: jax.Array, geometry: Geometry) -> jax.Array:
    """Finds tiles that may have a visible LOCAL key, bool ``[b, k, q, j]``: the sums by row need them."""
    begin = jnp.where(is_local, intervals.key_position, NO_END)
    end = jnp.where(is_local, intervals.key_end, NEVER)
    first, last = (f(intervals.query_position, geometry.query_block) for f in (first_query, last_query))
    return (least(begin, geometry.key_block) <= last) & (most(end, geometry.key_block) > first)


def within_reach(intervals: Intervals, columns: RoleColumns, windows: tuple[int, ...], geometry: Geometry) -> jax.Array:
    """Finds tiles that the sums for LOCAL or SLIDING reach, bool ``[b, k, q, j]``."""
    settled = jnp.maximum(intervals.key_position + max(windows), columns.next_global)
    return most(settled, geometry.key_block) >= first_query(intervals.query_position, geometry.query_block)
