"""Forward: one softmax carried over the live key blocks of each query block."""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import visible_tiles
from pallas_kernels.nats_attention.xla.lanes import (
    block_of,
    dot,
    hide,
    in_lanes,
    interval_lanes,
    lists_in_lanes,
    num_lanes,
    pad,
    pad_intervals,
    rows_of,
    visible_pairs,
)
from pallas_kernels.nats_attention.xla.tilings import XlaTiling

_LOWEST = -1e30  # below every logit, and finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: XlaTiling
) -> tuple[jax.Array, jax.Array]:
    """Attention over the visible pairs: see ``Backend``."""
    b, k, g, t, _ = query.shape
    bq, bk, lanes = tiling.query_block, tiling.key_block, num_lanes(tiling.lanes, b * k)
    intervals = pad_intervals(intervals, bq, bk)
    lists = lists_in_lanes(visible_tiles(intervals, bq, bk), lanes)
    num_blocks = lists.num_alive.shape[-1]
    query = in_lanes(pad(query, 3, bq, 0), lanes)
    key, value = (in_lanes(pad(x, 2, bk, 0), lanes) for x in (key, value))

    def group(arrays):
        query, key, value, intervals, lists = arrays

        def query_block(i):
            rows = rows_of(query, i, bq)

            def step(masked, position, carry):
                top, total, acc = carry
                j = lists.order[i, position]
                logits = scale * dot("pmh,psh->pms", rows, block_of(key, j, bk))
                if masked:
                    logits = hide(logits, visible_pairs(intervals, i, j, bq, bk), -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(logits, -1))
                weights = jnp.exp(logits - new_top[..., None])
                decay = jnp.exp(top - new_top)
                update = dot("pms,psh->pmh", weights.astype(value.dtype), block_of(value, j, bk))
                return new_top, total * decay + jnp.sum(weights, -1), acc * decay[..., None] + update

            carry = (
                jnp.full((lanes, g * bq), _LOWEST, jnp.float32),
                jnp.zeros((lanes, g * bq), jnp.float32),
                jnp.zeros((lanes, g * bq, value.shape[-1]), jnp.float32),
            )
            carry = jax.lax.fori_loop(0, lists.num_plain[i], lambda *a: step(False, *a), carry)
            carry = jax.lax.fori_loop(lists.num_plain[i], lists.num_alive[i], lambda *a: step(True, *a), carry)
            top, total, acc = carry
            out = acc / jnp.where(total == 0, 1, total)[..., None]
            return out.astype(query.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(total))

        return jax.lax.map(query_block, jnp.arange(num_blocks, dtype=jnp.int32))

    out, lse = jax.lax.map(group, (query, key, value, interval_lanes(intervals, lanes), lists))

    def by_head(x):  # [n, q, p, m, …] → [b, k, g, t, …]
        x = x.reshape(-1, num_blocks, lanes, g, bq, *x.shape[4:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(b, k, g, num_blocks * bq, *x.shape[5:])[:, :, :, :t]

    return by_head(out), by_head(lse)
