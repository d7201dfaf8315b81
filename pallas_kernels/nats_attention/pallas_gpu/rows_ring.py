"""The rows that the kernels by key block stream: which ones, in which order, and the ring that holds them.

Axis letters: ``n`` query head, ``m`` KV head (batch and heads in one axis each).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE


class Walk(NamedTuple):
    """The items that a key block looks at: every query block of its list, in parts of ``size`` rows, head by head.

    Attributes:
      block, kv_head: of the keys.
      num_plain, num_items: items without a mask, and all of them.
      order: in global memory, query blocks ``[m, j, q]``.
      size: rows of an item.
      group: query heads per KV head.
      heads: KV heads of a sequence.
    """

    block: jax.Array
    kv_head: jax.Array
    num_plain: jax.Array
    num_items: jax.Array
    order: Any
    size: int
    group: int
    heads: int

    @classmethod
    def of(cls, rows, key, lists, size: int, batch: int) -> "Walk":
        """Returns the walk of this block of threads; refs of ``rows [n, t, …]``, ``key [m, s, h]``, lists by key."""
        block, kv_head = lax.axis_index("block"), lax.axis_index("head")
        group = rows.query.shape[0] // key.shape[0]
        num_plain, num_items = (x[kv_head, block] * (group * BLOCK // size) for x in (lists.num_plain, lists.num_alive))
        return cls(block, kv_head, num_plain, num_items, lists.order, size, group, key.shape[0] // batch)

    def rows_of(self, item: jax.Array) -> tuple[jax.Array, Any]:
        """Returns ``(n, slice of t)``."""
        parts = jnp.int32(BLOCK // self.size)
        entry, rest = lax.div(item, parts * self.group), lax.rem(item, parts * self.group)
        start = self.order[self.kv_head, self.block, entry] * BLOCK + lax.rem(rest, parts) * self.size
        return self.kv_head * self.group + lax.div(rest, parts), pl.ds(start, self.size)

    def positions_of(self, item: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the index of the positions of the item's rows in ``query_position [b, t]``."""
        return lax.div(self.kv_head, jnp.int32(self.heads)), self.rows_of(item)[1]


class RowsRing(NamedTuple):
    """Shared memory for ``Rows`` and what guards it, each with as many slots as items fit."""

    query: Any
    dout: Any
    lse: Any
    delta: Any
    query_loaded: Any
    dout_loaded: Any
    consumed: Any

    @classmethod
    def of(cls, slots: int, size: int, head_dim: int, dtype) -> "RowsRing":
        """Returns the types to allocate."""
        tiles = wg_lib.tiles_in_shared_memory(slots, size, head_dim, dtype=dtype)
        vectors = plgpu.SMEM((slots, size), jnp.float32)
        loaded = plgpu.Barrier(num_arrivals=2, num_barriers=slots)
        consumed = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots)
        return cls(tiles, tiles, vectors, vectors, loaded, loaded, consumed)

    def feed(self, rows, walk: Walk, slots: int) -> None:
        """Runs the memory warpgroup; refs of ``rows`` in global memory."""

        def load(source, slot):
            plgpu.copy_gmem_to_smem(rows.query.at[source], self.query.at[slot], self.query_loaded.at[slot])
            plgpu.copy_gmem_to_smem(rows.lse.at[source], self.lse.at[slot], self.query_loaded.at[slot])
            plgpu.copy_gmem_to_smem(rows.dout.at[source], self.dout.at[slot], self.dout_loaded.at[slot])
            plgpu.copy_gmem_to_smem(rows.delta.at[source], self.delta.at[slot], self.dout_loaded.at[slot])

        wg_lib.feed(walk.num_items, slots, self.consumed, walk.rows_of, load)
