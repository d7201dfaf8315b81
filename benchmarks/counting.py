"""Pairs that a tiling computes, compared with those that count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nats_attention import layout as layout_lib
from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import pad_intervals, visible_tiles
from pallas_kernels.nats_attention.tiling import Tiling


class PairCount(NamedTuple):
    """Query-key pairs, summed over batch and KV heads.

    Attributes:
      computed: in tiles that hold a visible pair.
      live: visible.
      causal: that full attention reads.
    """

    computed: int
    live: int
    causal: int


def count_pairs(key_end: jax.Array, tiling: Tiling) -> PairCount:
    """Counts the pairs of one pass over visible tiles, for queries 0 … L-1 at the same indices as the keys.

    Args:
      key_end: int32 ``[b, k, s]``, as ``key_end_from_roles`` gives it.
      tiling: whose tiles and gathered run are counted.
    """
    b, k, length = key_end.shape
    index = jnp.arange(length, dtype=jnp.int32)
    intervals = Intervals(jnp.broadcast_to(index, (b, length)), jnp.broadcast_to(index, (b, k, length)), key_end)
    _, by_slot = layout_lib.arrange_for(intervals, tiling)
    tiles = visible_tiles(
        pad_intervals(by_slot, tiling.query_block, tiling.key_block), tiling.query_block, tiling.key_block
    )
    alive = np.asarray(tiles.alive).sum(dtype=np.int64)
    lifetime = np.maximum(np.minimum(np.asarray(key_end, np.int64), length) - np.arange(length), 0)
    return PairCount(
        computed=int(alive) * tiling.query_block * tiling.key_block,
        live=int(lifetime.sum()),
        causal=b * k * length * (length + 1) // 2,
    )
