"""Attention layers of type "gated": every key beyond the window has a gate, soft in training and open or shut later.

A rival of learned roles. The gate ``u[s]`` in (0, 1) is a sigmoid of the token's own state. In training a key within
the window is read as it is, and one beyond it with ``log u[s]`` added to its logits, so that the gradient is exact and
no role is drawn. Later a key is GLOBAL where its gate is above 1/2 (the role bias moves that), else SLIDING.

The original has no penalty, and the gates of a pretrained model begin open. Here the KV penalty and its controller are
those of learned roles, so that both can be compared at one budget. ``nats.final_temperature`` hardens the gates.

Source: SP-KV, arXiv:2605.14037. Axis letters as in ``natsjax.model.transformer``.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention import GLOBAL


def gated_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    *,
    window: int,
    document_end: jax.Array,
    sink: jax.Array | None = None,
) -> jax.Array:
    """Computes attention with soft gates on the keys beyond the window, with arrays of all pairs.

    Args:
      query: ``[b, t, k, g, h]``.
      key, value: ``[b, t, k, h]``.
      gate: float32 ``[b, k, s]``, in (0, 1].
      window: queries after its own that read a key whatever its gate is.
      document_end: int32 ``[b, s]``, exclusive; 0 marks padding.
      sink: float32 ``[k, g]``, logits of a further key whose value is 0; None: there is none.

    Returns:
      ``[b, t, k, g, h]`` in the dtype of ``query``; 0 for a query without a key to read.
    """
    index = jnp.arange(query.shape[1], dtype=jnp.int32)
    t, s = index[:, None], index[None, :]
    visible = ((s <= t) & (t < document_end[:, None, :]))[:, None, None]
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    bias = jnp.where(t - s <= window, 0, jnp.log(gate)[:, :, None, :])
    logits = logits * query.shape[-1] ** -0.5 + bias[:, :, None]
    # A row of padding has no key: its softmax is over the sink, or over equal logits whose weights are cleared.
    logits = jnp.where(visible, logits, -1e30)
    if sink is not None:
        last = jnp.broadcast_to(sink[None, :, :, None, None], (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, last], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : index.size]
    weights = jnp.where(visible, weights, 0).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).astype(query.dtype)


def gates(logits: jax.Array, is_first: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Returns the gate of every key, float32 ``[b, k, s]``, 1 for the first token of each document.

    Args:
      logits: float32 ``[b, k, s, 3]`` of the scorer, whose LOCAL is out of reach.
      is_first: bool ``[b, s]``.
      temperature: of the sigmoid.
    """
    gate = jax.nn.softmax(logits / temperature, axis=-1)[..., GLOBAL]
    least = jnp.finfo(jnp.float32).tiny  # so that its logarithm is finite
    return jnp.where(is_first[:, None, :], 1, jnp.maximum(gate, least))
