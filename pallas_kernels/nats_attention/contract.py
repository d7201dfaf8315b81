"""From what a call may hold to what the backends rely on, once for all of them.

Positions and ends can be any int32, in any order and repeated. A query that reads nothing and a key that no query reads
get the positions ``NO_END`` and ``NEVER``, which are outside of every interval, and such a key
holds zeros from here on: a weight of 0 times what it held before might be NaN.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``h`` head dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import as_int32
from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.roles import NEVER, NO_END


def index_intervals(key_end: jax.Array, num_queries: int) -> Intervals:
    """Returns the intervals of keys and queries whose positions are their indices; ``key_end`` int32 ``[b, k, s]``."""
    b, k, s = key_end.shape
    return Intervals(
        jnp.broadcast_to(jnp.arange(num_queries, dtype=jnp.int32), (b, num_queries)),
        jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, k, s)),
        key_end,
    )


def place(
    query_position: jax.Array | None, key_position: jax.Array | None, key_end: jax.Array, num_queries: int
) -> tuple[Intervals, jax.Array]:
    """Returns the intervals of a call, and the keys that no query reads.

    Args:
      query_position: ``[b, t]``, integers; None: the index.
      key_position: ``[b, k, s]``, integers; None: the index.
      key_end: int32 ``[b, k, s]``, exclusive.
      num_queries: t.

    Returns:
      ``Intervals`` with the same visible pairs, and bool ``[b, k, s]``: keys whose interval is empty, or is before
      the first or behind the last query that may read something.
    """
    at, begin, end = index_intervals(key_end, num_queries)
    if query_position is not None:
        at = as_int32("query_position", query_position, at.shape, outside=NO_END)
    if key_position is not None:
        begin = as_int32("key_position", key_position, begin.shape)
    if query_position is None:
        first, last = jnp.int32(0), jnp.int32(num_queries - 1)
    else:
        earliest = jnp.min(jnp.where(begin < end, begin, NO_END), axis=(1, 2))
        at = jnp.where(at < earliest[:, None], NO_END, at)
        first = jnp.min(at, axis=1)[:, None, None]
        last = jnp.max(jnp.where(at == NO_END, NEVER, at), axis=1)[:, None, None]
    unread = (end <= begin) | (end <= first) | (begin > last)
    return Intervals(at, jnp.where(unread, NO_END, begin), jnp.where(unread, NEVER, end)), unread


def clear(unread: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Sets keys and values ``[b, s, k, h]`` to 0 where ``unread`` bool ``[b, k, s]``."""
    by_key = jnp.moveaxis(unread, 1, 2)[..., None]
    return [jnp.where(by_key, 0, x) for x in arrays]
