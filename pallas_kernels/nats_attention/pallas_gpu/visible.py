"""The gradients through the visible pairs and the role sums over them: one kernel by query block, one by key block.

Both compute the logits and ``dout · value`` of a tile anew: sums over rows and sums over keys have no order of tiles
in common that keeps both in registers.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import Tiles, pad_intervals, visible_tiles
from pallas_kernels.nats_attention.pallas_gpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_gpu.by_key import key_gradients
from pallas_kernels.nats_attention.pallas_gpu.by_query import query_gradient
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.lists import one_head_axis, pad
from pallas_kernels.nats_attention.roles import RoleColumns, RoleSums


def visible_pass(
    rows: Rows,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    columns: RoleColumns | None,
    scale: float,
    windows: tuple[int, ...],
    tiling: GpuTiling,
) -> tuple[jax.Array, jax.Array, jax.Array, RoleSums | None]:
    """Computes gradients of query, key and value, and the role sums over visible pairs: see ``Backend``.

    The gradients come in the dtype of the operands, to which they are rounded anyway.
    """
    b, k, g, t, _ = rows.query.shape
    length = key.shape[2]
    intervals = pad_intervals(intervals, BLOCK, BLOCK)
    tiles = visible_tiles(intervals, BLOCK, BLOCK)
    is_local = next_global = None
    if columns is not None:
        columns = RoleColumns(*(pad(x, 2) for x in columns))
        tiles = Tiles(tiles.alive, tiles.plain & lists_lib.beyond_reach(intervals, columns, windows))
        is_local = one_head_axis(columns.is_local.astype(jnp.int32))
        next_global = one_head_axis(columns.next_global)
    rows = lists_lib.kernel_rows(rows)
    key, value = (one_head_axis(pad(x, 2)) for x in (key, value))
    by_head = Intervals(intervals.query_position, *(one_head_axis(x) for x in intervals[1:]))
    dquery, row = query_gradient(rows, key, value, by_head, is_local, lists_lib.lists_by_query(tiles), scale, tiling)
    dkey, dvalue, sums = key_gradients(
        rows, key, value, by_head, next_global, lists_lib.lists_by_key(tiles), scale, windows, tiling
    )
    dquery = dquery.reshape(b, k, g, *dquery.shape[1:])[:, :, :, :t]
    dkey, dvalue = (x.reshape(b, k, *x.shape[1:])[:, :, :length] for x in (dkey, dvalue))
    if row is None or sums is None:
        return dquery, dkey, dvalue, None
    row = jnp.sum(row.reshape(b, k, g, -1), axis=2)[:, :, :t]
    every, own, local, *sliding = sums.reshape(len(sums), b, k, -1)[..., :length]
    return dquery, dkey, dvalue, RoleSums(every, own, local, tuple(sliding), jnp.zeros_like(every), row)
