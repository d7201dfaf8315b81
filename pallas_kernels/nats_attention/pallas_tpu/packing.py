"""Layouts in memory: whole blocks, two operands side by side, and numbers in rows.

Query, its gradient and the output stay ``[b, k, g, t, h]``, of which a block is a slice of t: putting the heads of a
block side by side in memory would be a copy of its own. Everything else is ``[b, k, block, row, column]``.

*Pairs.* Key and value are side by side in one array of ``2 · half`` columns, query and gradient of the output likewise.
With head dim 128 each is a whole register wide and taken apart for nothing. With head dim 64 the pair is *one* register
wide and never taken apart: ``[q | 0] · [k | v]ᵀ`` is ``q · kᵀ``, and ``p · [k | v]`` has ``p · v`` in its second half.
A matrix unit is 128 wide, so neither costs more than the product of 64 columns would; an array of 64 columns of its own
would be padded to 128 in memory.

*Numbers.* Positions, ends, log-sum-exps are rows of an int32 array, one column a token (floats by their bits).

Axis letters: ``b`` batch, ``k`` KV head, ``g`` query heads per KV head, ``t`` query, ``s`` key, ``h`` head dim, ``m``
row of a block of queries (``g`` times the query block, head by head), ``i`` block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Rows
from pallas_kernels.nats_attention.blocks import clear_empty_rows, pad_to_blocks
from pallas_kernels.nats_attention.tiling import Tiling
from pallas_kernels.tpu_lanes import LANES


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a tile.

    Attributes:
      group: query heads per KV head.
      query_block, key_block: tokens.
      half: columns of one array of a pair: the head dim, padded.
    """

    group: int
    query_block: int
    key_block: int
    half: int

    @classmethod
    def of(cls, group: int, head_dim: int, tiling: Tiling) -> "Geometry":
        """Chooses the geometry: head dims up to 64 take 64 columns, larger ones a multiple of 128."""
        half = 64 if head_dim <= 64 else -(-head_dim // LANES) * LANES
        return cls(group, tiling.query_block, tiling.key_block, half)

    @property
    def rows(self) -> int:
        """Rows of a block of queries."""
        return self.group * self.query_block

    @property
    def width(self) -> int:
        """Columns of a pair."""
        return 2 * self.half

    @property
    def shared(self) -> bool:
        """True if a pair shares one register, so that its other operand has zeros in the other half."""
        return self.half < LANES

    @property
    def columns(self) -> int:
        """Columns of what meets one array of a pair, and of a product with it."""
        return max(self.half, LANES)


def row_blocks(x: jax.Array, geometry: Geometry, value=0) -> jax.Array:
    """Converts numbers ``[b, k, g, t]`` to ``[b, k, i, m]``."""
    x = pad_to_blocks(x, 3, geometry.query_block, value)
    b, k, g, _ = x.shape
    return jnp.swapaxes(x.reshape(b, k, g, -1, geometry.query_block), 2, 3).reshape(b, k, -1, geometry.rows)


def rows_from_blocks(x: jax.Array, geometry: Geometry, length: int) -> jax.Array:
    """Converts numbers ``[b, k, i, m]`` to ``[b, k, g, t]``."""
    b, k, i, _ = x.shape
    x = jnp.swapaxes(x.reshape(b, k, i, geometry.group, geometry.query_block), 2, 3)
    return x.reshape(b, k, geometry.group, -1)[:, :, :, :length]


def key_blocks(x: jax.Array, geometry: Geometry) -> jax.Array:
    """Converts ``[b, k, s, …]`` to ``[b, k, i, key_block, …]``."""
    x = pad_to_blocks(x, 2, geometry.key_block)
    return x.reshape(*x.shape[:2], -1, geometry.key_block, *x.shape[3:])


def keys_from_blocks(x: jax.Array, length: int) -> jax.Array:
    """Converts ``[b, k, i, key_block, …]`` to ``[b, k, s, …]``."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def columns_to(x: jax.Array, columns: int) -> jax.Array:
    """Appends zeros to ``x [..., h]``."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])


def pair(first: jax.Array, second: jax.Array, geometry: Geometry) -> jax.Array:
    """Puts two arrays ``[…, h]`` side by side, ``[…, 2 · half]``."""
    return jnp.concatenate([columns_to(x, geometry.half) for x in (first, second)], axis=-1)


def first_of(x: jax.Array, head_dim: int) -> jax.Array:
    """Returns the first array of a pair, or the product with it: ``[…, h]``."""
    return x[..., :head_dim]


def second_of(x: jax.Array, geometry: Geometry, head_dim: int) -> jax.Array:
    """Returns the second array of a pair, or the product with it: ``[…, h]``."""
    begin = geometry.half if x.shape[-1] > geometry.half else 0
    return x[..., begin : begin + head_dim]


def packed_rows(rows: Rows, query_position: jax.Array, key_dtype, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Packs the queries for a backward kernel; padded rows contribute nothing.

    Args:
      rows: of every query.
      query_position: int32 ``[b, t]``, padded to whole blocks.
      key_dtype: of key and value.
      geometry: of the tiles.

    Returns:
      ``[query | dout] [b, k, g, t, 2 · half]``, padded to whole blocks, and int32 ``[b, k, i, 3, m]``: position, lse
      and delta.
    """
    rows = clear_empty_rows(rows)
    dtype = jnp.result_type(rows.query, rows.dout, key_dtype)
    pairs = pad_to_blocks(pair(rows.query.astype(dtype), rows.dout.astype(dtype), geometry), 3, geometry.query_block)
    b, k, g, _ = rows.lse.shape
    at = jnp.broadcast_to(query_position[:, None, None], (b, k, g, query_position.shape[-1]))
    lse, delta = row_blocks(rows.lse, geometry, jnp.inf), row_blocks(rows.delta, geometry)
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (lse, delta)]
    return pairs, jnp.stack([row_blocks(at, geometry), *bits], axis=3)


def key_numbers(geometry: Geometry, *by_key: jax.Array) -> jax.Array:
    """Packs arrays ``[b, k, s]``, already padded, to int32 ``[b, k, i, len(by_key), key_block]``."""
    return jnp.stack([key_blocks(x.astype(jnp.int32), geometry) for x in by_key], axis=3)
