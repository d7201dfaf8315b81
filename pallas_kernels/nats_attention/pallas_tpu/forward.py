"""Forward: one softmax carried over the live key blocks of each query block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tpu_lanes as lanes
from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import pad_intervals, pad_to_blocks, visible_tiles
from pallas_kernels.nats_attention.pallas_tpu import lists as lists_lib
from pallas_kernels.nats_attention.pallas_tpu import packing, tile
from pallas_kernels.nats_attention.pallas_tpu.heuristics import TpuTiling
from pallas_kernels.nats_attention.pallas_tpu.launch import Blocks, Tokens, launch
from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry

# No logit is lower, and it is finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: TpuTiling
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the visible pairs: see ``Backend``."""
    b, k, g, t, h = query.shape
    bq = tiling.query_block
    geometry = Geometry.of(g, h, tiling)
    dtype = jnp.result_type(query, key, value)
    intervals = pad_intervals(intervals, bq, tiling.key_block)
    tiles = visible_tiles(intervals, bq, tiling.key_block)
    at = jnp.broadcast_to(intervals.query_position[:, None], (b, k, intervals.query_position.shape[-1]))
    num_blocks = at.shape[-1] // bq
    out, lse = launch(
        functools.partial(_kernel, geometry=geometry, scale=scale),
        lists_lib.block_lists(tiles, None),
        resident=[
            Tokens(pad_to_blocks(packing.columns_to(query.astype(dtype), geometry.columns), 3, bq), bq),
            Blocks(at.reshape(*at.shape[:2], -1, 1, bq)),
        ],
        streamed=[
            Blocks(packing.key_blocks(packing.pair(key.astype(dtype), value.astype(dtype), geometry), geometry)),
            Blocks(packing.key_numbers(geometry, *intervals[1:])),
        ],
        outs=[
            Tokens(jax.ShapeDtypeStruct((b, k, g, num_blocks * bq, geometry.columns), query.dtype), bq),
            Blocks(jax.ShapeDtypeStruct((b, k, num_blocks, 1, geometry.rows), jnp.float32)),
        ],
        scratch=[(geometry.rows, 128), (geometry.rows, 128), (geometry.rows, geometry.columns)],
        flops_a_tile=4 * geometry.rows * geometry.key_block * geometry.columns,
        exps_a_tile=geometry.rows * geometry.key_block,
        name="nats_attention_forward",
        interpret=tiling.interpret,
    )
    out = packing.second_of(out[:, :, :, :t], geometry, h)
    return out, packing.rows_from_blocks(lse[:, :, :, 0], geometry, t)


def _kernel(stream, resident, outs, scratch, *, geometry: Geometry, scale: float) -> None:
    query_ref, at_ref = resident
    out_ref, lse_ref = outs
    top_ref, total_ref, acc_ref = scratch
    top_ref[...] = jnp.full_like(top_ref, _LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    query = tile.rows_of(query_ref)
    at = lanes.spread(lanes.column(at_ref[...]), geometry.key_block)

    def visit(masked, pair_ref, numbers_ref):
        keys, values = tile.halves(pair_ref, geometry)
        logits = scale * tile.dot_transposed(query, keys)
        if masked:
            begin, end = numbers_ref[0:1], numbers_ref[1:2]
            # Not by adding −∞: a row that reads nothing may hold NaN.
            logits = tile.keep_by_head(logits, (begin <= at) & (at < end))
        top = top_ref[...]
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - lanes.spread(new_top, geometry.key_block))
        decay = jnp.exp(top - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * decay + lanes.fold_lanes(weights)
        update = tile.dot(weights.astype(values.dtype), values)
        acc_ref[...] = acc_ref[...] * lanes.spread(decay, geometry.columns) + update

    stream.walk(lists_lib.PLAIN, functools.partial(visit, False))
    stream.walk(lists_lib.MASKED, functools.partial(visit, True))

    total = jnp.broadcast_to(jnp.sum(total_ref[...], axis=1, keepdims=True), total_ref.shape)
    out = acc_ref[...] / lanes.spread(jnp.where(total == 0, 1, total), geometry.columns)
    out_ref[...] = out.astype(out_ref.dtype).reshape(out_ref.shape)
    lse_ref[...] = lanes.as_row(jnp.where(total == 0, -jnp.inf, top_ref[...] + jnp.log(total)))
