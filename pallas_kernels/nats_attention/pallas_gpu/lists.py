"""Arguments of the kernels: padded intervals and lists of blocks, by query block and by key block.

Axis letters: ``b`` batch, ``k`` KV head, ``q`` query block, ``j`` key block, ``n`` head (batch and heads in one axis).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import (
    LiveBlocks,
    Tiles,
    clear_empty_rows,
    first_query,
    live_blocks,
    most,
    pad_to_blocks,
)
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK
from pallas_kernels.nats_attention.roles import RoleColumns

LOG2E = 1.4426950408889634
"""Exponentials are powers of two here, the one that the hardware has: ``exp(x) = exp2(LOG2E · x)``."""


def pad(x: jax.Array, axis: int, value=0) -> jax.Array:
    """Pads ``x`` along ``axis`` to whole blocks."""
    return pad_to_blocks(x, axis, BLOCK, value)


def one_head_axis(x: jax.Array, axes: int = 2) -> jax.Array:
    """Converts ``[b, k, …]`` to ``[n, …]``, or more leading axes to one."""
    return x.reshape(-1, *x.shape[axes:])


def kernel_rows(rows: Rows) -> Rows:
    """Converts ``[b, k, g, t, …]`` to ``[n, t, …]`` in whole blocks, ``lse`` in base 2; padded rows add nothing."""
    fill = (0, 0, jnp.inf, 0)
    rows = clear_empty_rows(rows)
    padded = Rows(*(one_head_axis(pad(x, 3, value), 3) for x, value in zip(rows, fill, strict=True)))
    return padded._replace(lse=padded.lse * LOG2E)


def lists_by_query(tiles: Tiles) -> LiveBlocks:
    """Returns the key blocks of each query block: int32 ``[n, q, j]`` and ``[n, q]``."""
    return LiveBlocks(*(one_head_axis(x) for x in live_blocks(tiles)))


def lists_by_key(tiles: Tiles) -> LiveBlocks:
    """Returns the query blocks of each key block: int32 ``[n, j, q]`` and ``[n, j]``."""
    return lists_by_query(Tiles(*(jnp.swapaxes(x, 2, 3) for x in tiles)))


def beyond_reach(intervals: Intervals, columns: RoleColumns, windows: tuple[int, ...]) -> jax.Array:
    """Finds tiles whose rows are after the lifetimes of LOCAL and SLIDING, where only the full sum remains."""
    settled = jnp.maximum(intervals.key_position + max(windows), columns.next_global)
    return most(settled, BLOCK) < first_query(intervals.query_position, BLOCK)
