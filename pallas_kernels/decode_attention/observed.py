"""Attention that also returns how much of it every key received, for policies that evict by it.

Dense over the queries of a chunk and the keys at hand, so its memory is that of their product.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k·g``, ``h`` head
dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import as_int32, check_floats, check_head_dim, checked_scale
from pallas_kernels.nats_attention.roles import NO_END


def observed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_end: jax.Array,
    *,
    query_position: jax.Array,
    key_position: jax.Array,
    observed: jax.Array,
    sink: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention in which query t reads key s when ``key_position[s] <= query_position[t] < key_end[s]``.

    Positions and ends as in ``interval_attention``; a key that no query reads may hold anything.

    Args:
      query: ``[b, t, n, h]``, float; the query heads of one KV head are neighbors.
      key, value: ``[b, s, k, h]``, float.
      key_end, key_position: int32 ``[b, k, s]``.
      query_position: int32 ``[b, t]``; ``NO_END`` reads nothing, and so does -1 where no key stands before 0.
      observed: bool ``[b, t]``, queries whose attention is counted.
      sink: float ``[n]``, another logit of each head in the softmax's denominator, whose value is 0; None: without.
      scale: of the logits, a positive Python number; default ``h ** -0.5``.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``query``, 0 where nothing is read, and float32 ``[b, k, s]``: the weights that
      each key got, summed over the observed queries and the query heads of its KV head.
    """
    b, t, _, h = query.shape
    s, k = key.shape[1:3]
    check_floats(query=query, key=key, value=value)
    check_head_dim(h)
    scale = checked_scale(scale, h)
    query_position = as_int32("query_position", query_position, (b, t), outside=NO_END)
    key_position = as_int32("key_position", key_position, (b, k, s))
    key_end = as_int32("key_end", key_end, (b, k, s))
    grouped = query.reshape(b, t, k, query.shape[2] // k, h).astype(jnp.float32)
    logits = scale * jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    at = query_position[:, None, :, None]
    is_read = ((key_position[:, :, None] <= at) & (at < key_end[:, :, None]))[:, :, None]
    lowest = float(np.finfo(np.float32).min)
    top = jnp.max(jnp.where(is_read, logits, lowest), axis=-1, keepdims=True, initial=lowest)
    if sink is not None:
        sink = sink.astype(jnp.float32).reshape(*grouped.shape[2:4], 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.where(is_read, jnp.exp(logits - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    weights /= jnp.where(total == 0, 1, total)
    is_seen = jnp.moveaxis(is_read.any((2, 3)), 1, 2)[..., None]  # 0 times what another key holds might be NaN
    value = jnp.where(is_seen, value, 0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    attention_sum = jnp.sum(jnp.where(observed[:, None, None, :, None], weights, 0), axis=(2, 3))
    return out.reshape(query.shape).astype(query.dtype), attention_sum
