"""Which blocks of keys a block of queries has to look at, from minima and maxima alone.

Axis letters: ``b`` batch, ``k`` KV head, ``q`` query block, ``j`` key block. All of it is O(L) + O(q·j) integers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.roles import NEVER, NO_END, RoleColumns


class Tiles(NamedTuple):
    """Properties of tiles that are known before they are computed, bool ``[b, k, q, j]``.

    Attributes:
      alive: some pair in it may count.
      plain: every pair in it counts, and no more needs to be asked about single pairs; implies ``alive``.
    """

    alive: jax.Array
    plain: jax.Array


class LiveBlocks(NamedTuple):
    """The key blocks of each query block: plain ones first, then those with a mask, then the dead.

    Attributes:
      order: int32 ``[…, q, j]``, indices of key blocks.
      num_plain: int32 ``[…, q]``: ``order[…, :num_plain]`` are plain.
      num_alive: int32 ``[…, q]``: ``order[…, num_plain:num_alive]`` need the mask, the rest is dead.
    """

    order: jax.Array
    num_plain: jax.Array
    num_alive: jax.Array


def pad_to_blocks(x: jax.Array, axis: int, block: int, value=0) -> jax.Array:
    """Pads ``x`` with ``value`` along ``axis`` to a multiple of ``block``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def pad_intervals(intervals: Intervals, query_block: int, key_block: int) -> Intervals:
    """Intervals of whole blocks: padded rows read nothing and padded keys are read by none."""
    return Intervals(
        pad_to_blocks(intervals.query_position, 1, query_block, NO_END),
        pad_to_blocks(intervals.key_position, 2, key_block, NO_END),
        pad_to_blocks(intervals.key_end, 2, key_block, NEVER),
    )


def clear_empty_rows(rows: Rows) -> Rows:
    """Sets query and dout of ``rows`` to 0 where a row reads nothing: 0 times their content may be NaN."""
    reads = ~jnp.isposinf(rows.lse)[..., None]
    return rows._replace(query=jnp.where(reads, rows.query, 0), dout=jnp.where(reads, rows.dout, 0))


def _blocks(x: jax.Array, block: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, block)


def first_query(query_position: jax.Array, block: int) -> jax.Array:
    """Returns the least position in each query block, ``NO_END`` if no row reads: ``[b, t]`` → ``[b, 1, q, 1]``."""
    return jnp.min(_blocks(query_position, block), -1)[:, None, :, None]


def last_query(query_position: jax.Array, block: int) -> jax.Array:
    """Returns the largest position in each query block of a row that may read, in the shape of ``first_query``."""
    position = _blocks(query_position, block)
    return jnp.max(jnp.where(position == NO_END, NEVER, position), -1)[:, None, :, None]


def all_rows_read(query_position: jax.Array, block: int) -> jax.Array:
    """Returns True for query blocks without padding: ``[b, t]`` → bool ``[b, 1, q, 1]``."""
    return jnp.max(_blocks(query_position, block), -1)[:, None, :, None] != NO_END


def least(x: jax.Array, block: int) -> jax.Array:
    """Returns the minimum over each key block: ``[b, k, s]`` → ``[b, k, 1, j]``."""
    return jnp.min(_blocks(x, block), -1)[:, :, None, :]


def most(x: jax.Array, block: int) -> jax.Array:
    """Returns the maximum over each key block: ``[b, k, s]`` → ``[b, k, 1, j]``."""
    return jnp.max(_blocks(x, block), -1)[:, :, None, :]


def visible_tiles(intervals: Intervals, query_block: int, key_block: int) -> Tiles:
    """Finds tiles with a visible pair, and those in which every pair is visible.

    Args:
      intervals: lengths are multiples of the blocks.
      query_block, key_block: rows and columns of a tile.

    Returns:
      ``Tiles``, exact in ``plain``; ``alive`` may hold a tile whose keys begin and end for different rows.
    """
    first, last = (f(intervals.query_position, query_block) for f in (first_query, last_query))
    begin, end = intervals.key_position, intervals.key_end
    alive = (least(begin, key_block) <= last) & (most(end, key_block) > first)
    full = (most(begin, key_block) <= first) & (least(end, key_block) > last)
    return Tiles(alive, alive & full & all_rows_read(intervals.query_position, query_block))


def masked_out_tiles(
    intervals: Intervals, columns: RoleColumns, windows: tuple[int, ...], query_block: int, key_block: int
) -> Tiles:
    """Finds tiles with a hidden pair in reach; plain where all keys have ended and only the full sum remains.

    In a plain tile no pair is visible but those of GLOBAL keys, which have no hidden pair: their sums are cleared
    afterwards. Rows of padding give 0 whatever a tile holds, for their ratio is 0.

    Args:
      intervals: lengths are multiples of the blocks.
      columns: of every key, padded with 0.
      windows: of the SLIDING roles.
      query_block, key_block: rows and columns of a tile.
    """
    first, last = (f(intervals.query_position, query_block) for f in (first_query, last_query))
    begin = intervals.key_position
    reach = jnp.where(columns.is_global, 0, columns.reach)
    alive = (least(begin, key_block) <= last) & (most(reach, key_block) > first)
    settled = jnp.maximum(begin + max(windows), jnp.where(columns.is_local, columns.second_global, columns.next_global))
    plain = (most(settled, key_block) < first) & (least(columns.reach, key_block) > last)
    return Tiles(alive, alive & plain)


def live_blocks(tiles: Tiles) -> LiveBlocks:
    """Lists live key blocks, in index order, plain ones first; ``tiles`` of any shape ``[…, q, j]``."""
    state = jnp.where(tiles.plain, 0, jnp.where(tiles.alive, 1, 2)).astype(jnp.int32)
    order = jnp.argsort(state, axis=-1, stable=True).astype(jnp.int32)
    count = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32)  # noqa: E731
    return LiveBlocks(order, count(tiles.plain), count(tiles.alive))
