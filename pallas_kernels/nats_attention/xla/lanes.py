"""Padding to whole tiles, and tiles side by side in lanes, for the passes of this backend.

A CPU's products and XLA's loops want more work at a time than one tile. So several KV heads, and where these are few
several neighboring query blocks of each, go through a loop together: one *lane* for each pair of head and query block,
each with a list of key blocks of its own.

Axis letters: ``b`` batch, ``k`` KV head, ``g`` query heads per KV head, ``t`` query, ``s`` key, ``h`` head dim, ``j``
key block; ``n`` group of heads, ``a`` head in it (``n · a = b · k``), ``i`` step over the query blocks, ``p`` lane,
``m`` row of a tile (``g`` times the query block).
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import Tiles, live_blocks, pad_intervals, pad_to_blocks
from pallas_kernels.nats_attention.xla.heuristics import XlaTiling


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Which tiles go together: lane p is head ``p // blocks`` of the group and query block ``p % blocks`` of the step.

    Attributes:
      heads: KV heads of a group.
      blocks: neighboring query blocks of each.
      query_block, key_block: rows of each query head, and columns, of a tile.
    """

    heads: int
    blocks: int
    query_block: int
    key_block: int

    @classmethod
    def of(cls, tiling: XlaTiling, num_heads: int, num_queries: int) -> "Lanes":
        """Chooses the lanes for ``num_heads = b · k``: heads first, then query blocks."""
        heads = max(n for n in range(1, min(tiling.lanes, num_heads) + 1) if num_heads % n == 0)
        blocks = min(tiling.lanes // heads, -(-num_queries // tiling.query_block))
        return cls(heads, blocks, tiling.query_block, tiling.key_block)

    @property
    def rows(self) -> int:
        """Queries of a head that a step takes."""
        return self.blocks * self.query_block

    def pad_rows(self, x: jax.Array, axis: int, value) -> jax.Array:
        """Pads ``x`` to whole steps along an axis of queries."""
        return pad_to_blocks(x, axis, self.rows, value)

    def pad_keys(self, x: jax.Array, value) -> jax.Array:
        """Pads ``x [b, k, s, …]`` to whole blocks of keys."""
        return pad_to_blocks(x, 2, self.key_block, value)

    def rows_in_groups(self, x: jax.Array, value) -> jax.Array:
        """Converts ``[b, k, g, t, …]``, padded with ``value``, to ``[n, t, a, g, …]``.

        With the sequence in front of the heads again, as the caller's arrays have it: the transpositions cancel, and
        a step brings its own rows into order instead of a copy of all of them.
        """
        return jnp.moveaxis(self._in_groups(self.pad_rows(x, 3, value)), 3, 1)

    def keys_in_groups(self, x: jax.Array) -> jax.Array:
        """Converts ``[b, k, s, …]``, padded, to ``[n, a · j, key_block, …]``, the blocks of ``Lists.order``."""
        x = self._in_groups(self.pad_keys(x, 0))
        return x.reshape(x.shape[0], -1, self.key_block, *x.shape[3:])

    def keys_by_head(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Inverts ``keys_in_groups``: ``[n, a · j, key_block, …]`` → ``[b, k, s, …]``; ``shape = (b, k, s)``."""
        return x.reshape(*shape[:2], -1, *x.shape[3:])[:, :, : shape[2]]

    def _in_groups(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.heads, *x.shape[2:])

    def pad_intervals(self, intervals: Intervals) -> Intervals:
        """Intervals of whole steps and whole key blocks."""
        return pad_intervals(intervals, self.rows, self.key_block)

    def intervals_in_groups(self, intervals: Intervals) -> Intervals:
        """Converts padded intervals by head and by block: int32 ``[n, a, t]`` and ``[n, a · j, key_block]`` twice."""
        at, begin, end = intervals
        at = jnp.broadcast_to(at[:, None], (*end.shape[:2], at.shape[-1]))
        return Intervals(self._in_groups(at), self.keys_in_groups(begin), self.keys_in_groups(end))

    def lists(self, tiles: Tiles) -> "Lists":
        """Returns the list of each lane; ``tiles [b, k, q, j]``, ``q`` a multiple of ``blocks``."""
        order, num_plain, num_alive = live_blocks(tiles)
        head = jnp.arange(order.shape[0] * order.shape[1], dtype=jnp.int32).reshape(order.shape[:2]) % self.heads
        order += (head * order.shape[3])[:, :, None, None]

        def by_step(x):  # [b, k, q, …] → [n, i, p, …]
            x = self._in_groups(x)
            x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, self.blocks, *x.shape[3:]), 2, 1)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        # [n, i, j, p]: a step of the loop takes the blocks of all lanes
        order = jnp.swapaxes(by_step(order), 2, 3)
        return Lists(order, jnp.min(by_step(num_plain), -1), jnp.max(by_step(num_alive), -1))

    def rows_of(self, x: jax.Array, step) -> jax.Array:
        """Returns the rows of each lane, with the group of query heads folded in: ``[t, a, g, …]`` → ``[p, m, …]``."""
        part = jax.lax.dynamic_slice_in_dim(x, step * self.rows, self.rows, 0)
        part = part.reshape(self.blocks, self.query_block, *part.shape[1:])
        part = jnp.moveaxis(part, (2, 0, 3, 1), (0, 1, 2, 3))
        return part.reshape(self.heads * self.blocks, -1, *part.shape[4:])

    def positions_of(self, query_position: jax.Array, step) -> jax.Array:
        """Returns the positions of each lane's queries: ``[a, t]`` → ``[p, query_block]``."""
        part = jax.lax.dynamic_slice_in_dim(query_position, step * self.rows, self.rows, 1)
        return part.reshape(-1, self.query_block)

    def by_query(self, x: jax.Array) -> jax.Array:
        """Inverts ``rows_of``: ``[p, r · query_block, …]`` → ``[rows, a, r, …]``."""
        x = x.reshape(self.heads, self.blocks, -1, self.query_block, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 3, 0, 2), (0, 1, 2, 3))
        return x.reshape(self.rows, *x.shape[2:])

    def by_head(self, x: jax.Array, shape: tuple[int, int], num_queries: int) -> jax.Array:
        """Converts the results of the steps: ``[n, i, rows, a, r, …]`` → ``[b, k, r, t, …]``; ``shape = (b, k)``."""
        x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(*shape, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Lists:
    """Key blocks of each lane: plain ones first, then those with a mask, then the dead, which the mask hides.

    Attributes:
      order: int32 ``[n, i, j, p]``, numbers of blocks among those of the group.
      num_plain: int32 ``[n, i]``: as many as every lane of the step has.
      num_alive: int32 ``[n, i]``: as many as any lane of the step has.
    """

    order: jax.Array
    num_plain: jax.Array
    num_alive: jax.Array


jax.tree_util.register_dataclass(Lists)


def take(blocks: jax.Array, which: jax.Array) -> jax.Array:
    """Returns the block of each lane: ``blocks [a · j, …]``, ``which`` int32 ``[p]`` → ``[p, …]``."""
    return blocks.at[which].get(mode="promise_in_bounds")


def add(blocks: jax.Array, which: jax.Array, update: jax.Array) -> jax.Array:
    """Adds ``update [p, …]`` to the block of each lane in ``blocks [a · j, …]``; lanes may share a block."""
    return blocks.at[which].add(update, mode="promise_in_bounds")


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes ``einsum`` with a float32 result."""

    def product(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    def wide_product(x, y):
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    if x.dtype == y.dtype == jnp.float32:
        return product(x, y)
    # XLA's CPU products of narrow operands refuse a float32 result for some orders of the axes.
    return jax.lax.platform_dependent(x, y, cpu=wide_product, default=product)
