"""The role sums over pairs that the mask hides: for each key block a sum over the query blocks in its reach.

Nearly all of these tiles are plain: they need only the sum of e over all their rows, which needs no
``dout · value`` of the single pairs, because e is linear in the value (``ratio`` as in ``warpgroups.clipped_ratio``):

    sum_t e[t, s] = value[s] · (sum_t ratio dout[t]) - sum_t ratio delta[t]

So a plain tile takes two matrix products and one exponential a pair. Blocks of threads and axis letters as in
``by_key``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import LiveBlocks, masked_out_tiles, pad_intervals
from pallas_kernels.nats_attention.pallas_gpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_gpu import warpgroups as wg_lib
from pallas_kernels.nats_attention.pallas_gpu.heuristics import BLOCK, GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.lists import one_head_axis, pad
from pallas_kernels.nats_attention.pallas_gpu.rows_ring import RowsRing, Walk
from pallas_kernels.nats_attention.pallas_gpu.warpgroups import COMPUTE, PER_COLUMN, PER_ROW, ROWS, to_columns, to_rows
from pallas_kernels.nats_attention.roles import NEVER, RoleColumns, RoleSums


class _Ranges(NamedTuple):
    """The rows of a key, int32 ``[m, s]``: the hidden ones are ``stop <= t < reach``; then the last of each sum.

    ``lasts`` are those of ``local``, ``past``, and ``sliding`` for each window.
    """

    stop: jax.Array
    reach: jax.Array
    lasts: tuple[jax.Array, ...]

    @property
    def num_sums(self) -> int:
        """As many as there are last rows, and the sum over all."""
        return 1 + len(self.lasts)


def masked_out_pass(
    rows: Rows,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    weight: jax.Array,
    columns: RoleColumns,
    scale: float,
    windows: tuple[int, ...],
    tiling: GpuTiling,
) -> RoleSums:
    """Computes the role sums over masked-out pairs: see ``Backend``."""
    b, k, length, _ = key.shape
    intervals = pad_intervals(intervals, BLOCK, BLOCK)
    is_global = columns.is_global
    columns = RoleColumns(*(pad(x, 2) for x in columns))
    lists = lists_lib.lists_by_key(masked_out_tiles(intervals, columns, windows, BLOCK, BLOCK))
    # e is linear in dout and delta, so a row that stands for many is a row with a longer gradient.
    dout = (rows.dout * weight[:, None]).astype(rows.dout.dtype)
    begin = intervals.key_position
    ranges = _Ranges(
        stop=jnp.maximum(columns.key_end, begin),
        reach=columns.reach,
        lasts=(
            columns.next_global,
            jnp.where(columns.is_local, columns.second_global, NEVER),
            *(begin + window for window in windows),
        ),
    )
    key, value = (one_head_axis(pad(x, 2)) for x in (key, value))
    sums = _sums(
        lists_lib.kernel_rows(rows._replace(dout=dout, delta=rows.delta * weight)),
        key,
        value,
        intervals.query_position,
        jax.tree.map(one_head_axis, ranges),
        lists,
        scale,
        tiling,
    )
    every, local, past, *sliding = sums.reshape(ranges.num_sums, b, k, -1)[..., :length]
    # The plain tiles do not ask who is visible: there that can only be GLOBAL keys, and these have no hidden pair.
    every = jnp.where(is_global, 0, every)
    zeros = jnp.zeros_like(every)
    return RoleSums(every, zeros, local, tuple(sliding), past, zeros)


def _sums(
    rows: Rows,
    key: jax.Array,
    value: jax.Array,
    query_position: jax.Array,
    ranges: _Ranges,
    lists: LiveBlocks,
    scale: float,
    tiling: GpuTiling,
) -> jax.Array:
    """Computes ``all`` (not for GLOBAL), ``local``, ``past``, and each ``sliding`` of ``RoleSums``.

    Returns:
      float32 ``[ranges.num_sums, m, s]``.
    """
    (sums,) = wg_lib.launch(
        functools.partial(_kernel, tiling=tiling, scale=scale),
        _Inputs(rows, key, value, query_position, ranges, lists),
        [jax.ShapeDtypeStruct((ranges.num_sums, *key.shape[:2]), jnp.float32)],
        _Shared.of(tiling, key.shape[-1], key.dtype, ranges.num_sums),
        (lists.num_alive.shape[1], key.shape[0]),
        tiling.interpret,
        "masked_out",
    )
    return sums


class _Inputs(NamedTuple):
    """The arguments of ``_sums``; in the kernel, refs in global memory."""

    rows: Rows
    key: Any
    value: Any
    query_position: Any
    ranges: _Ranges
    lists: LiveBlocks


class _Shared(NamedTuple):
    """Shared memory: keys and values, the sums, and the rows that are streamed."""

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
            left=wg_lib.left_operand(tiling, tiling.rows, dtype),
            keys_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            ring=RowsRing.of(tiling.slots(tiling.rows), tiling.rows, head_dim, dtype),
        )


def _kernel(inputs: _Inputs, sums, *, shared: _Shared, tiling: GpuTiling, scale: float):
    rows, key, value, query_position, ranges, lists = inputs
    walk = Walk.of(rows, key, lists, tiling.rows, query_position.shape[0])
    ring, h, tile, slots = shared.ring, key.shape[-1], (ROWS, tiling.rows), tiling.slots(tiling.rows)

    def compute(warpgroup):
        kv_head, own = walk.kv_head, pl.ds(walk.block * BLOCK + warpgroup * ROWS, ROWS)
        keys, values = shared.keys.at[warpgroup], shared.values.at[warpgroup]
        sources = (key.at[kv_head, own], value.at[kv_head, own])
        wg_lib.copy_in(sources, (keys, values), shared.keys_loaded.at[warpgroup])

        def step(weighted, masked, item, carry):
            slot = wg_lib.slot_of(item, slots)
            where = walk.positions_of(item) if masked else None  # on its way while the rows are waited for
            plgpu.barrier_wait(ring.query_loaded.at[slot])
            logits = wg_lib.product(keys, ring.query.at[slot].T, tile)
            lse = wg_lib.vector(ring.lse.at[slot], PER_COLUMN)
            ratio = wg_lib.clipped_ratio(logits, to_columns(lse, ROWS), scale)
            plgpu.barrier_wait(ring.dout_loaded.at[slot])
            dout = ring.dout.at[slot]
            delta = to_columns(wg_lib.vector(ring.delta.at[slot], PER_COLUMN), ROWS)
            if masked:
                e = ratio * (wg_lib.product(values, dout.T, tile) - delta)
                at = to_columns(wg_lib.vector(query_position.at[where], PER_COLUMN), ROWS)
                known = jax.tree.map(lambda x: wg_lib.vector(x.at[kv_head, own], PER_ROW), ranges)
                carry = [x + y for x, y in zip(carry, _hidden_sums(e, at, known), strict=True)]
            else:
                narrow = ratio.astype(key.dtype)
                wg_lib.add_product(weighted, narrow, dout, shared.left, warpgroup)
                # The same rounded ratio on both sides: what dp and delta have in common has to cancel.
                shift = jnp.sum(narrow.astype(jnp.float32) * delta, axis=1)
                carry = [carry[0] - shift, *carry[1:]]
                plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.consumed.at[slot])
            return carry

        def accumulate(weighted):
            carry = [wg_lib.zeros((ROWS,), PER_ROW)] * ranges.num_sums
            carry = wg_lib.plain_then_masked(functools.partial(step, weighted), walk.num_plain, walk.num_items, carry)
            return weighted[...], carry

        weighted, own_sums = pl.run_scoped(accumulate, plgpu.ACC((ROWS, h), jnp.float32))
        wide = plgpu.load(values, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        own_sums[0] += jnp.sum(wide * weighted, axis=1)
        for i, x in enumerate(own_sums):
            shared.sums[i, warpgroup] = x
        wg_lib.copy_out([(shared.sums.at[i, warpgroup], sums.at[i, kv_head, own]) for i in range(ranges.num_sums)])

    wg_lib.by_role(compute, lambda: ring.feed(rows, walk, slots))


def _hidden_sums(e: jax.Array, at: jax.Array, known: _Ranges) -> list[jax.Array]:
    """Computes ``all``, ``local``, ``past`` and each ``sliding`` of a tile."""
    stop, reach, lasts = jax.tree.map(lambda x: to_rows(x, e.shape[1]), known)
    e = jnp.where((stop <= at) & (at < reach), e, 0.0)
    return [jnp.sum(e, axis=1), *(jnp.sum(jnp.where(at <= last, e, 0.0), axis=1) for last in lasts)]
