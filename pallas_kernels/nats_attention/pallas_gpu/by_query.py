"""The gradient of the query: for each query block a sum over its live key blocks.

Blocks of threads and axis letters as in ``forward``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import LiveBlocks
from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE, PER_COLUMN, PER_ROW, ROWS, to_columns, to_rows

_COLUMNS = 64  # two tiles of float32 and the sum have to fit into the registers


def query_gradient(
    rows: Rows,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    is_local: jax.Array | None,
    lists: LiveBlocks,
    scale: float,
    tiling: GpuTiling,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the gradient of the query and the sums by row.

    Args:
      rows: of the query heads, ``[n, t, …]``, as ``lists.kernel_rows`` gives them.
      key, value: of the KV heads, ``[m, s, h]``.
      intervals: ``query_position [b, t]``, the others ``[m, s]``.
      is_local: int32 ``[m, s]``, or None for no sums by row.
      lists: by query block.
      scale: of the logits.
      tiling: of the backend.

    Returns:
      ``dquery [n, t, h]`` in the query's dtype, and ``row`` float32 ``[n, t]`` or None: the sum of e over the visible
      LOCAL keys before a query.
    """
    dquery = jax.ShapeDtypeStruct(rows.query.shape, rows.query.dtype)
    row = jax.ShapeDtypeStruct(rows.lse.shape, jnp.float32)
    heads = rows.query.shape[0] // intervals.query_position.shape[0]
    results = wg_lib.launch(
        functools.partial(_kernel, tiling=tiling, heads=heads, scale=scale),
        _Inputs(rows, key, value, intervals, is_local, lists),
        [dquery] if is_local is None else [dquery, row],
        _Shared.of(tiling, key.shape[-1], key.dtype),
        (lists.num_alive.shape[1], rows.query.shape[0]),
        tiling.interpret,
        "query_gradient",
    )
    return results[0], None if is_local is None else results[1]


class _Inputs(NamedTuple):
    """The arguments of ``query_gradient``; in the kernel, refs in global memory."""

    rows: Rows
    key: Any
    value: Any
    intervals: Intervals
    is_local: Any
    lists: LiveBlocks


class _Shared(NamedTuple):
    """Shared memory: the rows of query (later of its gradient) and dout, the streamed tiles, and what guards them."""

    query: Any
    dout: Any
    row: Any
    keys: Any
    values: Any
    left: Any
    rows_loaded: Any
    keys_loaded: Any
    values_loaded: Any
    consumed: Any

    @classmethod
    def of(cls, tiling: GpuTiling, head_dim: int, dtype) -> "_Shared":
        """Returns the types to allocate."""
        own = wg_lib.tiles_in_shared_memory(COMPUTE, ROWS, head_dim, dtype=dtype)
        slots = tiling.slots(_COLUMNS)
        streamed = wg_lib.tiles_in_shared_memory(slots, _COLUMNS, head_dim, dtype=dtype)
        return cls(
            query=own,
            dout=own,
            row=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            keys=streamed,
            values=streamed,
            left=wg_lib.left_operand(tiling, _COLUMNS, dtype),
            rows_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            keys_loaded=plgpu.Barrier(num_barriers=slots),
            values_loaded=plgpu.Barrier(num_barriers=slots),
            consumed=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        )


def _kernel(inputs: _Inputs, dquery, row=None, *, shared: _Shared, tiling: GpuTiling, heads: int, scale: float):
    rows, key, value, intervals, is_local, lists = inputs
    # The last queries read most: they come first, so that short work is left for the end.
    block, head = rows.query.shape[1] // BLOCK - 1 - lax.axis_index("block"), lax.axis_index("head")
    kv_head = lax.div(head, jnp.int32(rows.query.shape[0] // key.shape[0]))
    h, tile = key.shape[-1], (ROWS, _COLUMNS)
    parts, slots = BLOCK // _COLUMNS, tiling.slots(_COLUMNS)
    num_plain, num_items = (x[kv_head, block] * parts for x in (lists.num_plain, lists.num_alive))

    def columns_of(item):
        j = lists.order[kv_head, block, lax.div(item, jnp.int32(parts))]
        return pl.ds(j * BLOCK + lax.rem(item, jnp.int32(parts)) * _COLUMNS, _COLUMNS)

    def load(where, slot):
        plgpu.copy_gmem_to_smem(key.at[kv_head, where], shared.keys.at[slot], shared.keys_loaded.at[slot])
        plgpu.copy_gmem_to_smem(value.at[kv_head, where], shared.values.at[slot], shared.values_loaded.at[slot])

    def compute(warpgroup):
        own = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
        query_rows, dout_rows = shared.query.at[warpgroup], shared.dout.at[warpgroup]
        sources = (rows.query.at[head, own], rows.dout.at[head, own])
        wg_lib.copy_in(sources, (query_rows, dout_rows), shared.rows_loaded.at[warpgroup])
        own_lse, own_delta = (wg_lib.vector(x.at[head, own], PER_ROW) for x in (rows.lse, rows.delta))

        def step(acc, masked, item, row_sum):
            slot = wg_lib.slot_of(item, slots)
            where = columns_of(item) if masked else None  # on its way while the keys are waited for
            plgpu.barrier_wait(shared.keys_loaded.at[slot])
            logits = wg_lib.product(query_rows, shared.keys.at[slot].T, tile)
            ratio = wg_lib.clipped_ratio(logits, to_rows(own_lse, _COLUMNS), scale)
            if masked:
                own_at = wg_lib.vector(intervals.query_position.at[lax.div(head, jnp.int32(heads)), own], PER_ROW)
                tile_at = to_rows(own_at, _COLUMNS)
                begin, end = (to_columns(wg_lib.vector(x.at[kv_head, where], PER_COLUMN), ROWS) for x in intervals[1:])
                ratio = jnp.where((begin <= tile_at) & (tile_at < end), ratio, 0.0)
            plgpu.barrier_wait(shared.values_loaded.at[slot])
            e = ratio * (wg_lib.product(dout_rows, shared.values.at[slot].T, tile) - to_rows(own_delta, _COLUMNS))
            if masked and row is not None:
                local = to_columns(wg_lib.vector(is_local.at[kv_head, where], PER_COLUMN), ROWS)
                row_sum += jnp.sum(jnp.where((local != 0) & (begin < tile_at), e, 0.0), axis=1)
            wg_lib.add_product(acc, e.astype(key.dtype), shared.keys.at[slot], shared.left, warpgroup)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(shared.consumed.at[slot])
            return row_sum

        def accumulate(acc):
            row_sum = wg_lib.zeros((ROWS,), PER_ROW)
            row_sum = wg_lib.plain_then_masked(functools.partial(step, acc), num_plain, num_items, row_sum)
            return acc[...], row_sum

        gradient, row_sum = pl.run_scoped(accumulate, plgpu.ACC((ROWS, h), jnp.float32))
        query_rows[...] = (scale * gradient).astype(key.dtype)
        results = [(query_rows, dquery.at[head, own])]
        if row is not None:
            shared.row[warpgroup] = row_sum
            results.append((shared.row.at[warpgroup], row.at[head, own]))
        wg_lib.copy_out(results)

    wg_lib.by_role(compute, lambda: wg_lib.feed(num_items, slots, shared.consumed, columns_of, load))
