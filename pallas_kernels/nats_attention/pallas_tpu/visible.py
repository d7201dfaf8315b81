"""Backward pass through the visible pairs: a kernel over keys for the query, one over queries for key and value.

``e[t, s] = exp(x - lse) * (dp - delta)`` with ``dp = dout · value`` is the gradient of the logit, and the role sums
are sums of it. Two kernels compute it twice, so that no grid step adds to the result of another.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_lanes as lanes
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import pad_intervals, pad_to_blocks, visible_tiles
from pallas_kernels.nats_attention.pallas_tpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_tpu import packing, tile
from pallas_kernels.nats_attention.pallas_tpu.heuristics import TpuTiling
from pallas_kernels.nats_attention.pallas_tpu.launch import Blocks, Tokens, launch
from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry
from pallas_kernels.nats_attention.roles import NO_END, RoleColumns, RoleSums


def visible_pass(
    rows: Rows,
    key,
    value,
    intervals: Intervals,
    columns: RoleColumns | None,
    scale: float,
    windows: tuple[int, ...],
    tiling: TpuTiling,
) -> tuple[jax.Array, jax.Array, jax.Array, RoleSums | None]:
    """Computes gradients of query, key and value, and the role sums over visible pairs: see ``Backend``."""
    _, _, g, t, h = rows.query.shape
    length = key.shape[2]
    geometry = Geometry.of(g, h, tiling)
    intervals = pad_intervals(intervals, tiling.query_block, tiling.key_block)
    if columns is not None:
        columns = RoleColumns(*(pad_to_blocks(x, 2, tiling.key_block) for x in columns))
    row_pairs, row_numbers = packing.packed_rows(rows, intervals.query_position, key.dtype, geometry)
    key_pairs = packing.key_blocks(packing.pair(key, value, geometry), geometry).astype(row_pairs.dtype)
    tiles = visible_tiles(intervals, tiling.query_block, tiling.key_block)
    settings = {"geometry": geometry, "scale": scale, "interpret": tiling.interpret}
    dquery, row = _query_gradient(row_pairs, row_numbers, key_pairs, intervals, columns, tiles, **settings)
    by_key, sums = _key_gradient(
        row_pairs, row_numbers, key_pairs, intervals, columns, tiles, windows=windows, **settings
    )
    dquery = dquery[:, :, :, :t]
    by_key = packing.keys_from_blocks(by_key, length)
    gradients = [packing.first_of(dquery, h), packing.first_of(by_key, h), packing.second_of(by_key, geometry, h)]
    dquery, dkey, dvalue = (x.astype(jnp.float32) for x in gradients)
    if sums is None:
        return dquery, dkey, dvalue, None
    every, own, local, *sliding = (packing.keys_from_blocks(sums[:, :, :, i], length) for i in range(sums.shape[3]))
    row = packing.keys_from_blocks(row[:, :, :, 0], t)
    return dquery, dkey, dvalue, RoleSums(every, own, local, tuple(sliding), jnp.zeros_like(every), row)


def _query_gradient(row_pairs, row_numbers, key_pairs, intervals, columns, tiles, *, geometry, scale, interpret):
    """Returns ``dquery [b, k, g, t, columns]`` and, with ``columns``, the sums by row ``[b, k, i, 1, query_block]``."""
    begin, end = intervals.key_position, intervals.key_end
    summed, numbers = None, [begin, end]
    if columns is not None:
        summed = lists_lib.with_local_keys(intervals, columns.is_local, geometry)
        numbers.append(jnp.where(columns.is_local, begin, NO_END))
    (*head, _), bq = row_pairs.shape, geometry.query_block
    outs: list[Blocks | Tokens] = [Tokens(jax.ShapeDtypeStruct((*head, geometry.columns), row_pairs.dtype), bq)]
    if columns is not None:
        outs.append(Blocks(jax.ShapeDtypeStruct((*row_numbers.shape[:3], 1, bq), jnp.float32)))
    dquery, *row = launch(
        functools.partial(_query_kernel, geometry=geometry, scale=scale),
        lists_lib.block_lists(tiles, summed),
        resident=[Tokens(row_pairs, bq), Blocks(row_numbers)],
        streamed=[Blocks(key_pairs), Blocks(packing.key_numbers(geometry, *numbers))],
        outs=outs,
        scratch=[(geometry.rows, geometry.columns), *([] if columns is None else [(bq, 128)])],
        flops_a_tile=6 * geometry.rows * geometry.key_block * geometry.columns,
        exps_a_tile=geometry.rows * geometry.key_block,
        name="nats_attention_query_gradient",
        interpret=interpret,
    )
    return dquery, row[0] if row else None


def _query_kernel(stream, resident, outs, scratch, *, geometry: Geometry, scale: float) -> None:
    pair_ref, numbers_ref = resident
    dquery_ref, acc_ref = outs[0], scratch[0]
    for ref in scratch:
        ref[...] = jnp.zeros_like(ref)
    query, dout = tile.operands(pair_ref, geometry)
    lse = lanes.column(tile.as_float(numbers_ref[1:2]))
    delta = lanes.column(tile.as_float(numbers_ref[2:3]))
    at = lanes.spread(lanes.column(numbers_ref[0:1, : geometry.query_block]), geometry.key_block)

    def visit(masked, summed, keys_ref, ends_ref):
        keys, values = tile.halves(keys_ref, geometry)
        logits = scale * tile.dot_transposed(query, keys) - lanes.spread(lse, geometry.key_block)
        if masked:
            begin, end = ends_ref[0:1], ends_ref[1:2]
            logits = tile.add_by_head(logits, tile.bias((begin <= at) & (at < end)))
        dp = tile.dot_transposed(dout, values)
        e = jnp.exp(logits) * (dp - lanes.spread(delta, geometry.key_block))
        acc_ref[...] += tile.dot(e.astype(keys.dtype), keys)
        if summed:
            local_begin = ends_ref[2:3]
            by_query = tile.sum_heads(e, geometry.query_block)
            scratch[1][...] += lanes.fold_lanes(jnp.where(local_begin < at, by_query, 0))

    stream.walk(lists_lib.PLAIN, functools.partial(visit, False, False))
    stream.walk(lists_lib.MASKED, functools.partial(visit, True, False))
    if len(outs) > 1:
        stream.walk(lists_lib.SUMMED, functools.partial(visit, True, True))
        outs[1][...] = lanes.sum_lanes_as_row(scratch[1][...])
    dquery_ref[...] = (scale * acc_ref[...]).astype(dquery_ref.dtype).reshape(dquery_ref.shape)


def _key_gradient(row_pairs, row_numbers, key_pairs, intervals, columns, tiles, *, geometry, scale, windows, interpret):
    """Returns ``[dkey | dvalue] [b, k, j, key_block, width]`` and, with ``columns``, the sums by key.

    The sums are ``[b, k, j, 3 + windows, key_block]``: all, own, local, and sliding for each window.
    """
    summed, numbers = None, list(intervals[1:])
    num_sums = 0 if columns is None else 3 + len(windows)
    if columns is not None:
        summed = jnp.swapaxes(lists_lib.within_reach(intervals, columns, windows, geometry), 2, 3)
        numbers.append(columns.next_global)
    outs = [Blocks(jax.ShapeDtypeStruct(key_pairs.shape, key_pairs.dtype))]
    if num_sums:
        sums_shape = (*key_pairs.shape[:3], num_sums, geometry.key_block)
        outs.append(Blocks(jax.ShapeDtypeStruct(sums_shape, jnp.float32)))
    by_key, *sums = launch(
        functools.partial(_key_kernel, geometry=geometry, scale=scale, windows=windows),
        lists_lib.block_lists(lists_lib.transposed(tiles), summed),
        resident=[Blocks(key_pairs), Blocks(packing.key_numbers(geometry, *numbers))],
        streamed=[Tokens(row_pairs, geometry.query_block), Blocks(row_numbers)],
        outs=outs,
        scratch=[*[(geometry.key_block, geometry.columns)] * 2, *[(geometry.key_block, 128)] * num_sums],
        flops_a_tile=8 * geometry.rows * geometry.key_block * geometry.columns,
        exps_a_tile=geometry.rows * geometry.key_block,
        name="nats_attention_key_gradient",
        interpret=interpret,
    )
    return by_key, sums[0] if sums else None


def _key_kernel(stream, resident, outs, scratch, *, geometry: Geometry, scale: float, windows: tuple[int, ...]) -> None:
    pair_ref, ends_ref = resident
    dkey_ref, dvalue_ref, *sum_refs = scratch
    for ref in scratch:
        ref[...] = jnp.zeros_like(ref)
    keys, values = tile.operands(pair_ref, geometry)
    begin, end, *following = (
        lanes.spread(lanes.column(ends_ref[i : i + 1]), geometry.query_block) for i in range(ends_ref.shape[0])
    )

    def visit(masked, summed, rows_ref, numbers_ref):
        queries, douts = tile.halves(rows_ref, geometry)
        at = numbers_ref[0:1, : geometry.query_block]
        lse, delta = tile.as_float(numbers_ref[1:2]), tile.as_float(numbers_ref[2:3])
        logits = scale * tile.dot_transposed(keys, queries) - lse
        if masked:
            visible = tile.bias((begin <= at) & (at < end))
            logits += lanes.repeat_lanes(visible, geometry.group)
        ratio = jnp.exp(logits)
        e = ratio * (tile.dot_transposed(values, douts) - delta)
        dvalue_ref[...] += tile.dot(ratio.astype(douts.dtype), douts)
        dkey_ref[...] += tile.dot(e.astype(queries.dtype), queries)
        if not sum_refs:
            return
        by_query = lanes.fold_lanes(e, geometry.query_block)
        sum_refs[0][...] += lanes.fold_lanes(by_query)
        if summed:
            near = (at - begin <= window for window in windows)
            ranges = (at == begin, (begin < at) & (at <= following[0]), *near)
            for ref, where in zip(sum_refs[1:], ranges, strict=True):
                ref[...] += lanes.fold_lanes(jnp.where(where, by_query, 0))

    stream.walk(lists_lib.PLAIN, functools.partial(visit, False, False))
    stream.walk(lists_lib.MASKED, functools.partial(visit, True, False))
    if sum_refs:
        stream.walk(lists_lib.SUMMED, functools.partial(visit, True, True))
        for i, ref in enumerate(sum_refs):
            outs[1][i : i + 1] = lanes.sum_lanes_as_row(ref[...])
    tile.write_pair(outs[0], scale * dkey_ref[...], dvalue_ref[...], geometry)
