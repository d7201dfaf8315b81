"""Attention layers of type "selective": queries tell later queries which keys not to read.

A rival of learned roles without parameters of its own. The logits of one query head, the layer's first, serve twice:
as its own, and, where positive, as masks. What query u gives key s, ``S[u, s]``, is the ReLU of that logit; 0 for the
query's own key and for the first token of the document, which nothing masks. All heads' logits of query t and key s get
``-F[t, s]``, the sum of ``S[u, s]`` over the queries u before t: a mask takes effect for later queries. The gradient
flows through both uses.

Later a layer may keep a number of keys alone, the same ones in all heads: after each query the key with the largest
mask is dropped for good, of equal ones the oldest; the first token of the document stays.

All layers keep as many keys, and training knows nothing of a budget. (How the paper itself chooses the numbers of keys
was not at hand; its abstract and listing were.)

Source: Selective Attention, arXiv:2410.02703: its listing has the head, the ReLU, the two zeros, and the shift by one
query. Axis letters as in ``natsjax.model.transformer``.
"""

import jax
import jax.numpy as jnp


def selection(query: jax.Array, key: jax.Array, may_mask: jax.Array) -> jax.Array:
    """Computes what queries give to keys: ``S``, float32 ``[b, t, s]``.

    Args:
      query: ``[b, t, h]``, of the masking head.
      key: ``[b, s, h]``, of its KV head.
      may_mask: bool ``[b, t, s]``, pairs in which the query can read the key and may mask it (``maskable``).
    """
    logits = jnp.einsum(
        "bth,bsh->bts", query, key, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.where(may_mask, jax.nn.relu(logits * query.shape[-1] ** -0.5), 0)


def maskable(query_position: jax.Array, key_position: jax.Array, is_read: jax.Array) -> jax.Array:
    """Returns the pairs that a mask may come of: bool ``[b, t, s]``.

    Args:
      query_position: int32 ``[b, t]``, distance to the start of the document.
      key_position: int32 ``[b, s]``.
      is_read: bool ``[b, t, s]``, pairs in which the query can read the key.
    """
    key_position = key_position[:, None, :]
    return is_read & (key_position != query_position[..., None]) & (key_position > 0)


def masks(selected: jax.Array, before: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Sums up what keys were given.

    Args:
      selected: ``S``, float32 ``[b, t, s]``, of neighboring queries.
      before: float32 ``[b, s]``, what the keys had before the first of these queries; None: nothing.

    Returns:
      ``(F, after)``, float32 ``[b, t, s]``: before each query, and after it.
    """
    start = jnp.zeros_like(selected[:, :1]) if before is None else before[:, None]
    after = start + jnp.cumsum(selected, axis=1)
    return jnp.concatenate([start, after[:, :-1]], axis=1), after


def selective_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masked: jax.Array,
    is_read: jax.Array,
    sink: jax.Array | None = None,
) -> jax.Array:
    """Computes attention with ``F`` subtracted from all heads' logits, with arrays of all pairs.

    Args:
      query: ``[b, t, k, g, h]``.
      key, value: ``[b, s, k, h]``.
      masked: ``F``, float32 ``[b, t, s]``.
      is_read: bool ``[b, 1 or k, t, s]``, pairs in which the query can read the key.
      sink: float32 ``[k, g]``, logits of a further key whose value is 0 and that nothing masks; None: there is none.

    Returns:
      ``[b, t, k, g, h]`` in the dtype of ``query``; 0 for a query without a key to read.
    """
    is_read = is_read[:, :, None]
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(is_read, logits * query.shape[-1] ** -0.5 - masked[:, None, None], -1e30)
    if sink is not None:
        last = jnp.broadcast_to(sink[None, :, :, None, None], (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, last], axis=-1)
    # A row of padding has no key: its softmax is over the sink, or over equal logits whose weights are cleared.
    weights = jax.nn.softmax(logits, axis=-1)[..., : key.shape[1]]
    weights = jnp.where(is_read, weights, 0).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).astype(query.dtype)


def least_masked_end(after: jax.Array, key_end: jax.Array, is_first: jax.Array, num_keys: int | jax.Array) -> jax.Array:
    """Drops keys with the largest masks, so that no query finds more than ``num_keys`` and its own.

    Args:
      after: float32 ``[b, t, s]``, of ``masks``: what each key has after each query, t = s.
      key_end: int32 ``[b, s]``, the first query that cannot read each key anyway.
      is_first: bool ``[b, s]``, first tokens of documents, which are not dropped.
      num_keys: 1 or more.

    Returns:
      int32 ``[b, s]``: the first query that cannot read each key.
    """
    index = jnp.arange(key_end.shape[1], dtype=jnp.int32)

    def step(end, numbered):
        t, mask = numbered
        is_live = (index <= t) & (end > t + 1)
        is_full = jnp.sum(is_live, axis=-1, keepdims=True) > num_keys  # by one: the key of query t is new
        score = jnp.where(is_live & ~is_first, mask, -1)
        is_largest = index == jnp.argmax(score, axis=-1, keepdims=True)  # the oldest of equal ones
        return jnp.where(is_full & is_largest, t + 1, end), None

    return jax.lax.scan(step, key_end, (index, jnp.swapaxes(after, 0, 1)))[0]
