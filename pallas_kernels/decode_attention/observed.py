"""Attention that also says how much of it every key received: what policies look at that evict by it.

Dense over the queries of a chunk and the keys at hand, so its memory is that of their product.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k·g``, ``h`` head
dim.
"""

import jax
import jax.numpy as jnp


def observed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_end: jax.Array,
    *,
    query_position: jax.Array,
    key_position: jax.Array,
    observed: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention in which query t reads key s when ``key_position[s] <= query_position[t] < key_end[s]``.

    Args:
      query: ``[b, t, n, h]``, float; the query heads of one KV head are neighbours.
      key, value: ``[b, s, k, h]``, float.
      key_end, key_position: int32 ``[b, k, s]``.
      query_position: int32 ``[b, t]``; -1 reads nothing.
      observed: bool ``[b, t]``, queries whose attention is counted.
      scale: of the logits; default ``h ** -0.5``.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``query``, 0 where nothing is read, and float32 ``[b, k, s]``: the weights that
      each key got, summed over the observed queries and the query heads of its KV head.
    """
    b, t, _, h = query.shape
    k = key.shape[2]
    scale = h**-0.5 if scale is None else scale
    grouped = query.reshape(b, t, k, -1, h).astype(jnp.float32)
    logits = scale * jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    at = query_position[:, None, :, None]
    is_read = ((key_position[:, :, None] <= at) & (at < key_end[:, :, None]))[:, :, None]
    top = jnp.max(jnp.where(is_read, logits, -1e30), axis=-1, keepdims=True)
    weights = jnp.where(is_read, jnp.exp(logits - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights /= jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    mass = jnp.sum(jnp.where(observed[:, None, None, :, None], weights, 0), axis=(2, 3))
    return out.reshape(query.shape).astype(query.dtype), mass
