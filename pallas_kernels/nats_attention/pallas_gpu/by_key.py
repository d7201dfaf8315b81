"""The gradients of key and value and the role sums over visible pairs: for each key block a sum over its query blocks.

A block of threads serves 128 keys of one KV head and looks at the rows of all query heads of its group. Tiles are
transposed, keys before rows. Axis letters: ``n`` query head, ``m`` KV head (batch and heads in one axis each).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import LiveBlocks
from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.rows_ring import RowsRing, Walk
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE, PER_COLUMN, PER_ROW, ROWS, to_columns, to_rows

_STREAMED = 64  # rows at once: two tiles of float32 and two sums have to fit into the registers
_OTHER_SUMS = 3  # all, own, local; then one for each window


def key_gradients(
    rows: Rows,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    next_global: jax.Array | None,
    lists: LiveBlocks,
    scale: float,
    windows: tuple[int, ...],
    tiling: GpuTiling,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes the gradients of key and value and the role sums by key.

    Args:
      rows: of the query heads, ``[n, t, …]``, as ``lists.kernel_rows`` gives them.
      key, value: of the KV heads, ``[m, s, h]``.
      intervals: ``query_position [b, t]``, the others ``[m, s]``.
      next_global: int32 ``[m, s]`` of ``RoleColumns``, or None: no role sums are asked for.
      lists: by key block.
      scale: of the logits.
      windows: of the SLIDING roles.
      tiling: of the backend.

    Returns:
      ``dkey``, ``dvalue [m, s, h]`` in the key's dtype, and the sums ``all``, ``own``, ``local`` and, for each
      window, ``sliding`` of ``RoleSums``, float32 ``[3 + windows, m, s]``, or None.
    """
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    num_sums = _OTHER_SUMS + len(windows)
    sums = jax.ShapeDtypeStruct((num_sums, *key.shape[:2]), jnp.float32)
    results = wg_lib.launch(
        functools.partial(_kernel, tiling=tiling, scale=scale, windows=windows),
        _Inputs(rows, key, value, intervals, next_global, lists),
        [gradient, gradient] if next_global is None else [gradient, gradient, sums],
        _Shared.of(tiling, key.shape[-1], key.dtype, num_sums),
        (lists.num_alive.shape[1], key.shape[0]),
        tiling.interpret,
        "key_gradients",
    )
    return results[0], results[1], None if next_global is None else results[2]


class _Inputs(NamedTuple):
    """The arguments of ``key_gradients``; in the kernel, refs in global memory."""

    rows: Rows
    key: Any
    value: Any
    intervals: Intervals
    next_global: Any
    lists: LiveBlocks


class _Shared(NamedTuple):
    """Shared memory: keys and values (later their gradients), the role sums, and the rows that are streamed."""

    keys: Any
    values: Any
    sums: Any
    left: Any
    keys_loaded: Any
    ring: RowsRing

    @classmethod
    def of(cls, tiling: GpuTiling, head_dim: int, dtype, num_sums: int) -> "_Shared":
        """Returns the types to allocate."""
        own = wg_lib.tiles_in_shared_memory(COMPUTE, ROWS, head_dim, dtype=dtype)
        return cls(
            keys=own,
            values=own,
            sums=plgpu.SMEM((num_sums, COMPUTE, ROWS), jnp.float32),
            left=wg_lib.left_operand(tiling, _STREAMED, dtype),
            keys_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            ring=RowsRing.of(tiling.slots(_STREAMED), _STREAMED, head_dim, dtype),
        )


def _kernel(
    inputs: _Inputs,
    dkey,
    dvalue,
    sums=None,
    *,
    shared: _Shared,
    tiling: GpuTiling,
    scale: float,
    windows: tuple[int, ...],
):
    rows, key, value, intervals, next_global, lists = inputs
    walk = Walk.of(rows, key, lists, _STREAMED, intervals.query_position.shape[0])
    ring, h, tile, slots = shared.ring, key.shape[-1], (ROWS, _STREAMED), tiling.slots(_STREAMED)

    def compute(warpgroup):
        kv_head, own = walk.kv_head, pl.ds(walk.block * BLOCK + warpgroup * ROWS, ROWS)
        keys, values = shared.keys.at[warpgroup], shared.values.at[warpgroup]
        sources = (key.at[kv_head, own], value.at[kv_head, own])
        wg_lib.copy_in(sources, (keys, values), shared.keys_loaded.at[warpgroup])

        def of_keys(integers):
            # Read anew for every tile with a mask, which costs less than registers that the other tiles need.
            return to_rows(wg_lib.vector(integers.at[kv_head, own], PER_ROW), _STREAMED)

        def step(dkey_acc, dvalue_acc, masked, item, carry):
            slot = wg_lib.slot_of(item, slots)
            where = walk.positions_of(item) if masked else None  # on its way while the rows are waited for
            plgpu.barrier_wait(ring.query_loaded.at[slot])
            logits = wg_lib.product(keys, ring.query.at[slot].T, tile)
            lse = wg_lib.vector(ring.lse.at[slot], PER_COLUMN)
            ratio = wg_lib.clipped_ratio(logits, to_columns(lse, ROWS), scale)
            if masked:
                at = to_columns(wg_lib.vector(intervals.query_position.at[where], PER_COLUMN), ROWS)
                begin, end = (of_keys(x) for x in intervals[1:])
                visible = (begin <= at) & (at < end)
                ratio = jnp.where(visible, ratio, 0.0)
            plgpu.barrier_wait(ring.dout_loaded.at[slot])
            dout = ring.dout.at[slot]
            delta = to_columns(wg_lib.vector(ring.delta.at[slot], PER_COLUMN), ROWS)
            e = ratio * (wg_lib.product(values, dout.T, tile) - delta)
            # Only now, as narrow operands: before, they would take registers beside the products that e is made of.
            wg_lib.add_product(dvalue_acc, ratio.astype(key.dtype), dout, shared.left, warpgroup)
            wg_lib.add_product(dkey_acc, e.astype(key.dtype), ring.query.at[slot], shared.left, warpgroup)
            if sums is not None:
                own_sums = [jnp.sum(e, axis=1)]  # in a tile without a mask, the other sums are behind their reach
                if masked:
                    own_sums += _sums_in_reach(e, at, begin, of_keys(next_global), windows)
                carry = [x + y for x, y in zip(carry, own_sums, strict=False)] + carry[len(own_sums) :]
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.consumed.at[slot])
            return carry

        def accumulate(dkey_acc, dvalue_acc):
            carry = [] if sums is None else [wg_lib.zeros((ROWS,), PER_ROW)] * (_OTHER_SUMS + len(windows))
            body = functools.partial(step, dkey_acc, dvalue_acc)
            carry = wg_lib.plain_then_masked(body, walk.num_plain, walk.num_items, carry)
            return dkey_acc[...], dvalue_acc[...], carry

        acc = plgpu.ACC((ROWS, h), jnp.float32)
        dkey_rows, dvalue_rows, own_sums = pl.run_scoped(accumulate, acc, acc)
        keys[...] = (scale * dkey_rows).astype(key.dtype)
        values[...] = dvalue_rows.astype(key.dtype)
        for i, x in enumerate(own_sums):
            shared.sums[i, warpgroup] = x
        results = [(keys, dkey.at[kv_head, own]), (values, dvalue.at[kv_head, own])]
        results += [(shared.sums.at[i, warpgroup], sums.at[i, kv_head, own]) for i in range(len(own_sums))]
        wg_lib.copy_out(results)

    wg_lib.by_role(compute, lambda: ring.feed(rows, walk, slots))


def _sums_in_reach(
    e: jax.Array, at: jax.Array, begin: jax.Array, next_global: jax.Array, windows: tuple[int, ...]
) -> list[jax.Array]:
    """Computes ``own``, ``local`` and each ``sliding`` of a tile; ``e`` is 0 for hidden pairs."""
    wheres = (at == begin, (begin < at) & (at <= next_global), *(at <= begin + window for window in windows))
    return [jnp.sum(jnp.where(where, e, 0.0), axis=1) for where in wheres]
