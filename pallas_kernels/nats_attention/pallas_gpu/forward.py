"""Forward: one softmax carried over the live key blocks of each query block.

A block of threads serves 128 rows of one query head; the query heads of a group read their K and V tiles through the
second-level cache. Axis letters: ``n`` query head, ``m`` KV head (batch and heads in one axis each).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import LiveBlocks, pad_intervals, visible_tiles
from pallas_kernels.nats_attention.pallas_gpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.lists import LOG2E, one_head_axis, pad
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE, PER_COLUMN, PER_ROW, ROWS, to_columns, to_rows

# No logit is lower, and it is finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: GpuTiling
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the visible pairs: see ``Backend``."""
    b, k, g, t, h = query.shape
    intervals = pad_intervals(intervals, BLOCK, BLOCK)
    lists = lists_lib.lists_by_query(visible_tiles(intervals, BLOCK, BLOCK))
    query = one_head_axis(pad(query, 3), 3)
    key, value = (one_head_axis(pad(x, 2)) for x in (key, value))
    begin, end = (one_head_axis(x) for x in intervals[1:])
    out, lse = wg_lib.launch(
        functools.partial(_kernel, tiling=tiling, heads=k * g, scale=scale * LOG2E),
        _Inputs(query, key, value, Intervals(intervals.query_position, begin, end), lists),
        [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(query.shape[:2], jnp.float32)],
        _Shared.of(tiling, h, query.dtype),
        (lists.num_alive.shape[1], query.shape[0]),
        tiling.interpret,
        "forward",
    )
    out, lse = (x.reshape(b, k, g, *x.shape[1:])[:, :, :, :t] for x in (out, lse))
    return out, lse


class _Inputs(NamedTuple):
    """Query heads ``[n, t, h]``, KV heads ``[m, s, h]``, intervals and lists by KV head; in the kernel, refs."""

    query: Any
    key: Any
    value: Any
    intervals: Intervals
    lists: LiveBlocks


class _Shared(NamedTuple):
    """Shared memory: the rows of the query and later of the output, the streamed tiles, and what guards them."""

    rows: Any
    lse: Any
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
        slots = tiling.slots(tiling.columns)
        streamed = wg_lib.tiles_in_shared_memory(slots, tiling.columns, head_dim, dtype=dtype)
        return cls(
            rows=wg_lib.tiles_in_shared_memory(COMPUTE, ROWS, head_dim, dtype=dtype),
            lse=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            keys=streamed,
            values=streamed,
            left=wg_lib.left_operand(tiling, tiling.columns, dtype),
            rows_loaded=plgpu.Barrier(num_barriers=COMPUTE),
            keys_loaded=plgpu.Barrier(num_barriers=slots),
            values_loaded=plgpu.Barrier(num_barriers=slots),
            consumed=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        )


def _kernel(inputs: _Inputs, out, lse, *, shared: _Shared, tiling: GpuTiling, heads: int, scale: float):
    query, key, value, intervals, lists = inputs
    # The last queries read most: they come first, so that short work is left for the end.
    block, head = query.shape[1] // BLOCK - 1 - lax.axis_index("block"), lax.axis_index("head")
    kv_head = lax.div(head, jnp.int32(query.shape[0] // key.shape[0]))
    columns, h = tiling.columns, query.shape[-1]
    parts, slots = BLOCK // columns, tiling.slots(columns)
    num_plain, num_items = (x[kv_head, block] * parts for x in (lists.num_plain, lists.num_alive))

    def columns_of(item):
        j = lists.order[kv_head, block, lax.div(item, jnp.int32(parts))]
        return pl.ds(j * BLOCK + lax.rem(item, jnp.int32(parts)) * columns, columns)

    def load(where, slot):
        plgpu.copy_gmem_to_smem(key.at[kv_head, where], shared.keys.at[slot], shared.keys_loaded.at[slot])
        plgpu.copy_gmem_to_smem(value.at[kv_head, where], shared.values.at[slot], shared.values_loaded.at[slot])

    def compute(warpgroup):
        own = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
        query_rows = shared.rows.at[warpgroup]
        wg_lib.copy_in([query.at[head, own]], [query_rows], shared.rows_loaded.at[warpgroup])
        own_at = wg_lib.vector(intervals.query_position.at[lax.div(head, jnp.int32(heads)), own], PER_ROW)

        def step(masked, item, carry):
            top, total, acc = carry
            slot = wg_lib.slot_of(item, slots)
            where = columns_of(item) if masked else None  # on its way while the keys are waited for
            plgpu.barrier_wait(shared.keys_loaded.at[slot])
            logits = scale * wg_lib.product(query_rows, shared.keys.at[slot].T, (ROWS, columns))
            if masked:
                tile_at = to_rows(own_at, columns)
                first, stop = (to_columns(wg_lib.vector(x.at[kv_head, where], PER_COLUMN), ROWS) for x in intervals[1:])
                logits = jnp.where((first <= tile_at) & (tile_at < stop), logits, -jnp.inf)
            new_top = lax.max(top, jnp.max(logits, axis=1))
            weights = jnp.exp2(logits - to_rows(new_top, columns))
            decay = jnp.exp2(top - new_top)
            total = total * decay + jnp.sum(weights, axis=1)
            narrow = weights.astype(value.dtype)
            plgpu.barrier_wait(shared.values_loaded.at[slot])

            def multiply(update):
                wg_lib.add_product(update, narrow, shared.values.at[slot], shared.left, warpgroup)
                return update[...]

            update = pl.run_scoped(multiply, plgpu.ACC((ROWS, h), jnp.float32))
            plgpu.barrier_arrive(shared.consumed.at[slot])
            return new_top, total, acc * to_rows(decay, h) + update

        carry = (
            wg_lib.zeros((ROWS,), PER_ROW, _LOWEST),
            wg_lib.zeros((ROWS,), PER_ROW),
            wg_lib.zeros((ROWS, h), plgpu.Layout.WGMMA),
        )
        carry = wg_lib.plain_then_masked(step, num_plain, num_items, carry)
        top, total, acc = carry
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        shared.lse[warpgroup] = jnp.where(empty, -jnp.inf, top * math.log(2) + jnp.log(total))
        query_rows[...] = (acc / to_rows(total, h)).astype(query.dtype)
        wg_lib.copy_out([(query_rows, out.at[head, own]), (shared.lse.at[warpgroup], lse.at[head, own])])

    wg_lib.by_role(compute, lambda: wg_lib.feed(num_items, slots, shared.consumed, columns_of, load))
