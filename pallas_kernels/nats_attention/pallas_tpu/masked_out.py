"""The role sums over pairs that the mask hides: what would a longer life have been worth?

Of most tiles only the sum over all rows of each key is wanted, and that needs no product with the values in the tile:

    sum_t e[t, s] = value[s] · (sum_t ratio dout[t]) - sum_t ratio delta[t]

so a plain tile takes two products and one exponential a pair. Only tiles in which a lifetime may end look at single e.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_lanes as lanes
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import masked_out_tiles, pad_intervals, pad_to_blocks
from pallas_kernels.nats_attention.pallas_tpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_tpu import packing, tile
from pallas_kernels.nats_attention.pallas_tpu.heuristics import TpuTiling
from pallas_kernels.nats_attention.pallas_tpu.launch import Blocks, Tokens, launch
from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry
from pallas_kernels.nats_attention.roles import NEVER, RoleColumns, RoleSums


def masked_out_pass(
    rows: Rows,
    key,
    value,
    intervals: Intervals,
    weight,
    columns: RoleColumns,
    scale: float,
    windows: tuple[int, ...],
    tiling: TpuTiling,
) -> RoleSums:
    """Computes the role sums over masked-out pairs: see ``Backend``."""
    b, k, length, h = key.shape
    geometry = Geometry.of(rows.query.shape[2], h, tiling)
    intervals = pad_intervals(intervals, tiling.query_block, tiling.key_block)
    is_global = columns.is_global
    columns = RoleColumns(*(pad_to_blocks(x, 2, tiling.key_block) for x in columns))
    tiles = masked_out_tiles(intervals, columns, windows, geometry.query_block, geometry.key_block)
    # e is linear in dout and delta, so a row that stands for many is a row with a longer gradient.
    dout = (rows.dout * weight[:, None]).astype(rows.dout.dtype)
    rows = rows._replace(dout=dout, delta=rows.delta * weight)
    row_pairs, row_numbers = packing.packed_rows(rows, intervals.query_position, key.dtype, geometry)
    second_global = jnp.where(columns.is_local, columns.second_global, NEVER)
    numbers = [*intervals[1:], columns.reach, columns.next_global, second_global]
    num_sums = 3 + len(windows)
    num_blocks = intervals.key_end.shape[-1] // geometry.key_block
    (sums,) = launch(
        functools.partial(_kernel, geometry=geometry, scale=scale, windows=windows),
        lists_lib.block_lists(lists_lib.transposed(tiles), None),
        resident=[
            Blocks(packing.key_blocks(packing.pair(key, value, geometry), geometry).astype(row_pairs.dtype)),
            Blocks(packing.key_numbers(geometry, *numbers)),
        ],
        streamed=[Tokens(row_pairs, tiling.query_block), Blocks(row_numbers)],
        outs=[Blocks(jax.ShapeDtypeStruct((b, k, num_blocks, num_sums, geometry.key_block), jnp.float32))],
        scratch=[(geometry.key_block, geometry.columns), *[(geometry.key_block, 128)] * num_sums],
        flops_a_tile=4 * geometry.rows * geometry.key_block * geometry.columns,
        exps_a_tile=geometry.rows * geometry.key_block,
        name="nats_attention_masked_out",
        interpret=tiling.interpret,
    )
    every, local, past, *sliding = (packing.keys_from_blocks(sums[:, :, :, i], length) for i in range(num_sums))
    # The plain tiles do not ask who is visible: there that can only be GLOBAL keys, and these have no hidden pair.
    every = jnp.where(is_global, 0, every)
    zeros = jnp.zeros_like(every)
    return RoleSums(every, zeros, local, tuple(sliding), past, zeros)


def _kernel(stream, resident, outs, scratch, *, geometry: Geometry, scale: float, windows: tuple[int, ...]) -> None:
    pair_ref, ends_ref = resident
    weighted_ref, delta_ref, *sum_refs = scratch
    for ref in scratch:
        ref[...] = jnp.zeros_like(ref)
    keys, values = tile.operands(pair_ref, geometry)
    begin, end, reach, next_global, second_global = (
        lanes.spread(lanes.column(ends_ref[i : i + 1]), geometry.query_block) for i in range(5)
    )

    def visit(masked, rows_ref, numbers_ref):
        queries, douts = tile.halves(rows_ref, geometry)
        at = numbers_ref[0:1, : geometry.query_block]
        lse, delta = tile.as_float(numbers_ref[1:2]), tile.as_float(numbers_ref[2:3])
        logits = jnp.minimum(scale * tile.dot_transposed(keys, queries) - lse, 0)  # a ratio of at most 1
        if masked:
            hidden = tile.bias((begin <= at) & (at < reach) & (at >= end))
            logits += lanes.repeat_lanes(hidden, geometry.group)
        ratio = jnp.exp(logits)
        narrow = ratio.astype(douts.dtype)
        weighted_ref[...] += tile.dot(narrow, douts)
        # The rounded ratio here too: what cancels in dp - delta has to cancel in the difference of the sums.
        delta_ref[...] += lanes.fold_lanes(narrow.astype(jnp.float32) * delta)
        if masked:
            e = ratio * (tile.dot_transposed(values, douts) - delta)
            by_query = lanes.fold_lanes(e, geometry.query_block)
            near = (at - begin <= window for window in windows)
            ranges = (at <= next_global, at <= second_global, *near)
            for ref, where in zip(sum_refs, ranges, strict=True):
                ref[...] += lanes.fold_lanes(jnp.where(where, by_query, 0))

    stream.walk(lists_lib.PLAIN, functools.partial(visit, False))
    stream.walk(lists_lib.MASKED, functools.partial(visit, True))

    # The zeros beside a value drop the half of the product that is not of dout.
    every = lanes.fold_lanes(values.astype(jnp.float32) * weighted_ref[...]) - delta_ref[...]
    for i, sums in enumerate((every, *(ref[...] for ref in sum_refs))):
        outs[0][i : i + 1] = lanes.sum_lanes_as_row(sums)
