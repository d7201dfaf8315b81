"""Forward: one softmax carried over the live key blocks of each query block.

A block of threads serves 128 rows of one query head; the query heads of a group read their K and V tiles through the
second-level cache. Axis letters: ``n`` query head, ``m`` KV head (batch and heads in one axis each).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import visible_tiles
from pallas_kernels.nats_attention.pallas_gpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.lists import LOG2E, one_head_axis, pad
from pallas_kernels.nats_attention.pallas_gpu.tilings import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE, PER_COLUMN, PER_ROW, ROWS, to_columns, to_rows

_LOWEST = -1e30  # below every logit, and finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: GpuTiling
) -> tuple[jax.Array, jax.Array]:
    """Attention over the visible pairs: see ``Backend``."""
    b, k, g, t, h = query.shape
    intervals = lists_lib.pad_intervals(intervals)
    lists = lists_lib.lists_by_query(visible_tiles(intervals, BLOCK, BLOCK))
    query = one_head_axis(pad(query, 3), 3)
    key, value = (one_head_axis(pad(x, 2)) for x in (key, value))
    begin, end = (one_head_axis(x) for x in intervals[1:])
    out, lse = wg_lib.launch(
        functools.partial(_kernel, tiling=tiling, heads=k * g, group=g, scale=scale * LOG2E),
        (query, key, value, intervals.query_position, begin, end, *lists),
        (query, jax.ShapeDtypeStruct(query.shape[:2], jnp.float32)),
        _scratch(tiling, h, query.dtype),
        (lists.num_alive.shape[1], query.shape[0]),
        tiling.interpret,
    )
    out, lse = (x.reshape(b, k, g, *x.shape[1:])[:, :, :, :t] for x in (out, lse))
    return out, lse


def _scratch(tiling: GpuTiling, head_dim: int, dtype):
    streamed = wg_lib.tiles_in_shared_memory(tiling.stages, tiling.columns, head_dim, dtype=dtype)
    return {
        "rows": wg_lib.tiles_in_shared_memory(COMPUTE, ROWS, head_dim, dtype=dtype),  # of the query, then of the output
        "lse_rows": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "keys": streamed,
        "values": streamed,
        "left": wg_lib.left_operand(tiling, tiling.columns, dtype),
        "rows_loaded": plgpu.Barrier(num_barriers=COMPUTE),
        "keys_loaded": plgpu.Barrier(num_barriers=tiling.stages),
        "values_loaded": plgpu.Barrier(num_barriers=tiling.stages),
        "consumed": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiling.stages),
    }


def _kernel(
    # global memory
    query,
    key,
    value,
    at,
    begin,
    end,
    order,
    num_plain,
    num_alive,
    out,
    lse,
    *,
    # shared memory
    rows,
    lse_rows,
    keys,
    values,
    left,
    rows_loaded,
    keys_loaded,
    values_loaded,
    consumed,
    # static
    tiling: GpuTiling,
    heads: int,
    group: int,
    scale: float,
):
    block, head = lax.axis_index("block"), lax.axis_index("head")
    kv_head = lax.div(head, jnp.int32(group))
    columns, h = tiling.columns, query.shape[-1]
    parts = BLOCK // columns
    num_items = num_alive[kv_head, block] * parts

    def columns_of(item):
        j = order[kv_head, block, lax.div(item, jnp.int32(parts))]
        return pl.ds(j * BLOCK + lax.rem(item, jnp.int32(parts)) * columns, columns)

    def load(item, slot):
        where = columns_of(item)
        plgpu.copy_gmem_to_smem(key.at[kv_head, where], keys.at[slot], keys_loaded.at[slot])
        plgpu.copy_gmem_to_smem(value.at[kv_head, where], values.at[slot], values_loaded.at[slot])

    def compute(warpgroup):
        own = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
        query_rows = rows.at[warpgroup]
        plgpu.copy_gmem_to_smem(query.at[head, own], query_rows, rows_loaded.at[warpgroup])
        own_at = wg_lib.vector(at.at[lax.div(head, jnp.int32(heads)), own], PER_ROW)
        plgpu.barrier_wait(rows_loaded.at[warpgroup])

        def step(masked, item, carry):
            top, total, acc = carry
            slot = lax.rem(item, jnp.int32(tiling.stages))
            plgpu.barrier_wait(keys_loaded.at[slot])
            logits = scale * wg_lib.product(query_rows, keys.at[slot].T, (ROWS, columns))
            if masked:
                where = columns_of(item)
                tile_at = to_rows(own_at, columns)
                first, stop = (to_columns(wg_lib.vector(x.at[kv_head, where], PER_COLUMN), ROWS) for x in (begin, end))
                logits = jnp.where((first <= tile_at) & (tile_at < stop), logits, -jnp.inf)
            new_top = lax.max(top, jnp.max(logits, axis=1))
            weights = jnp.exp2(logits - to_rows(new_top, columns))
            decay = jnp.exp2(top - new_top)
            total = total * decay + jnp.sum(weights, axis=1)
            narrow = weights.astype(value.dtype)
            plgpu.barrier_wait(values_loaded.at[slot])

            def multiply(update):
                wg_lib.add_product(update, narrow, values.at[slot], left, warpgroup)
                return update[...]

            update = pl.run_scoped(multiply, plgpu.ACC((ROWS, h), jnp.float32))
            plgpu.barrier_arrive(consumed.at[slot])
            return new_top, total, acc * to_rows(decay, h) + update

        carry = (
            wg_lib.zeros((ROWS,), PER_ROW, _LOWEST),
            wg_lib.zeros((ROWS,), PER_ROW),
            wg_lib.zeros((ROWS, h), plgpu.Layout.WGMMA),
        )
        carry = wg_lib.plain_then_masked(step, num_plain[kv_head, block] * parts, num_items, carry)
        top, total, acc = carry
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        lse_rows[warpgroup] = jnp.where(empty, -jnp.inf, top * math.log(2) + jnp.log(total))
        query_rows[...] = (acc / to_rows(total, h)).astype(query.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query_rows, out.at[head, own])
        plgpu.copy_smem_to_gmem(lse_rows.at[warpgroup], lse.at[head, own])
        plgpu.wait_smem_to_gmem(0)

    wg_lib.by_role(compute, lambda: wg_lib.feed(num_items, tiling.stages, consumed, load))
