"""Forward: one softmax carried over the live key blocks of each query block."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.blocks import visible_tiles
from pallas_kernels.nats_attention.xla.heuristics import XlaTiling
from pallas_kernels.nats_attention.xla.lanes import Lanes, dot, take

# No logit is lower, and it is finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: XlaTiling
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the visible pairs: see ``Backend``."""
    b, k, _, t, _ = query.shape
    lanes = Lanes.of(tiling, b * k, t)
    intervals = lanes.pad_intervals(intervals)
    lists = lanes.lists(visible_tiles(intervals, lanes.query_block, lanes.key_block))

    def group(arrays):
        query, key, value, intervals, lists = arrays

        def query_blocks(i):
            rows = lanes.rows_of(query, i)
            at = lanes.positions_of(intervals.query_position, i)
            at = jnp.tile(at, rows.shape[1] // at.shape[1])[:, :, None]  # of each row: one select without reshapes

            def step(masked, position, carry):
                top, total, acc = carry
                j = lists.order[i, position]
                logits = dot("pmh,psh->pms", rows, take(key, j))  # scaled below: one pass over the tile less
                if masked:
                    begin, end = (take(x, j)[:, None, :] for x in intervals[1:])
                    logits = jnp.where((begin <= at) & (at < end), logits, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(logits, -1))
                weights = jnp.exp(scale * (logits - new_top[..., None]))
                decay = jnp.exp(scale * (top - new_top))
                update = dot("pms,psh->pmh", weights.astype(value.dtype), take(value, j))
                return new_top, total * decay + jnp.sum(weights, -1), acc * decay[..., None] + update

            carry = (
                jnp.full(rows.shape[:2], _LOWEST, jnp.float32),
                jnp.zeros(rows.shape[:2], jnp.float32),
                jnp.zeros((*rows.shape[:2], value.shape[-1]), jnp.float32),
            )
            carry = vary_like(carry, arrays)
            carry = jax.lax.fori_loop(0, lists.num_plain[i], lambda *a: step(False, *a), carry)
            carry = jax.lax.fori_loop(lists.num_plain[i], lists.num_alive[i], lambda *a: step(True, *a), carry)
            top, total, acc = carry
            out = acc / jnp.where(total == 0, 1, total)[..., None]
            lse = jnp.where(total == 0, -jnp.inf, scale * top + jnp.log(total))
            return lanes.by_query(out.astype(query.dtype)), lanes.by_query(lse)

        return jax.lax.map(query_blocks, jnp.arange(lists.num_alive.shape[0], dtype=jnp.int32))

    arrays = (
        lanes.rows_in_groups(query, 0),
        *(lanes.keys_in_groups(x) for x in (key, value)),
        lanes.intervals_in_groups(intervals),
        lists,
    )
    out, lse = jax.lax.map(group, arrays)  # [n, i, rows, a, g, …]
    return lanes.by_head(out, (b, k), t), lanes.by_head(lse, (b, k), t)
