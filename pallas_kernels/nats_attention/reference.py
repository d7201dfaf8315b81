"""Dense oracles for the tests: they build every L×L array and are never a fallback.

``relaxed_attention`` is the definition (docs/method.md 3): attention under a mask that is a smooth function of the
roles, left to automatic differentiation. ``closed_form_attention`` has the same values and the written-out gradient,
with the clip for masked-out pairs on or off. Both follow the dtype of their input, so tests run them in float64.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention import roles as roles_lib


def _grouped(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """Converts ``[b, t, n, h]`` to ``[b, t, k, g, h]``; the query heads of a KV head are neighbors."""
    b, t, n, h = query.shape
    return query.reshape(b, t, num_kv_heads, n // num_kv_heads, h)


def _logits(query, key, scale):
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return scale * jnp.einsum(
        "btkgh,bskh->bkgts", _grouped(query, key.shape[2]), key, preferred_element_type=wide
    ).astype(wide)


def _output(probabilities, value, query):
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities, value.astype(probabilities.dtype))
    return out.reshape(query.shape[:-1] + value.shape[-1:]).astype(query.dtype)


def _same_document(document_end: jax.Array | None, length: int) -> jax.Array:
    """Returns bool ``[b or 1, t, s]``: ``s <= t < end(s)``."""
    index = jnp.arange(length)
    end = jnp.full((1, length), length) if document_end is None else document_end
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[:, None, :])


def _as_tuple(window: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(window) if isinstance(window, Sequence) else (window,)


def relaxed_mask(roles: jax.Array, *, window: int | Sequence[int], document_end: jax.Array | None = None) -> jax.Array:
    """Returns the mask as a smooth function of the roles; ``roles`` float ``[b, k, s, r]`` → float ``[b, k, t, s]``.

    ``m[t, s] = G[s] + S[s] [t <= s + window] + Lo[s] prod_{s < u < t} (1 - G[u])`` for ``s <= t`` in one document,
    with a term ``S`` for each window.
    """
    length = roles.shape[2]
    index = jnp.arange(length)
    is_global = roles[..., roles_lib.GLOBAL]

    def step(alive, t):
        ended = jnp.where(index < t, 1 - is_global[..., t][..., None], 1)
        return alive * ended, alive

    _, alive = jax.lax.scan(step, jnp.ones_like(is_global), index)
    alive = jnp.moveaxis(alive, 0, 2)  # [b, k, t, s]
    mask = is_global[:, :, None, :] + roles[:, :, None, :, roles_lib.LOCAL] * alive
    for role, reach in enumerate(_as_tuple(window), roles_lib.SLIDING):
        mask += roles[:, :, None, :, role] * (index[:, None] <= index[None, :] + reach)
    return jnp.where(_same_document(document_end, length)[:, None], mask, 0)


def _masked_softmax(logits, mask, visible_somewhere):
    """Computes ``m exp(x) / sum m exp(x)`` over the last axis; 0 in rows without a visible key."""
    top = jnp.max(jnp.where(visible_somewhere, logits, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = mask * jnp.exp(jnp.where(visible_somewhere, logits - top, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _log_sum_exp(logits, visible):
    """Computes the log-sum-exp over the last axis; −∞, without a gradient, in rows without a visible key."""
    something = visible.any(-1)
    lse = jax.nn.logsumexp(jnp.where(visible | ~something[..., None], logits, -jnp.inf), axis=-1)
    return jnp.where(something, lse, -jnp.inf)


def relaxed_attention(query, key, value, roles, *, window, document_end=None, scale=None, return_lse=False):
    """Computes ``nats_attention`` by the relaxed mask, for automatic differentiation (no clip). Shapes as there."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = relaxed_mask(roles, window=window, document_end=document_end)[:, :, None]
    causal = _same_document(document_end, key.shape[1])[:, None, None]
    logits = _logits(query, key, scale)
    out = _output(_masked_softmax(logits, mask, causal), value, query)
    return (out, _by_query(_relaxed_log_sum_exp(logits, mask, causal))) if return_lse else out


def _relaxed_log_sum_exp(logits, mask, causal):
    """Computes ``log sum m exp(x)`` over the last axis; −∞, without a gradient, in rows without a key."""
    something = causal.any(-1)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(causal, logits, -jnp.inf), axis=-1))
    top = jnp.where(something, top, 0)
    total = jnp.sum(mask * jnp.exp(jnp.where(causal, logits - top[..., None], -jnp.inf)), axis=-1)
    return jnp.where(something, top + jnp.log(jnp.where(something, total, 1)), -jnp.inf)


def _by_query(x: jax.Array) -> jax.Array:
    """Converts ``[b, k, g, t]`` to ``[b, t, n]``."""
    b, _, _, t = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(b, t, -1)


def interval_attention(
    query, key, value, key_end, *, query_position=None, key_position=None, scale=None
) -> tuple[jax.Array, jax.Array]:
    """Computes ``interval_attention`` densely: ``(out [b, t, n, h], lse [b, t, n])``. Shapes as in ``api``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    t, s = query.shape[1], key.shape[1]
    query_position = jnp.arange(t)[None] if query_position is None else query_position
    key_position = jnp.arange(s)[None, None] if key_position is None else key_position
    at = query_position[:, None, None, :, None]
    visible = (key_position[:, :, None, None, :] <= at) & (at < key_end[:, :, None, None, :])
    reads = jnp.moveaxis(visible.any(-1), 3, 1)[..., None]  # [b, t, k, 1, 1]
    query = jnp.where(reads, _grouped(query, key.shape[2]), 0).reshape(query.shape)
    logits = _logits(query, key, scale)
    lse = _log_sum_exp(logits, visible)  # [b, k, g, t]
    out = _output(_masked_softmax(logits, visible.astype(logits.dtype), visible), value, query)
    # The gradient of a row that reads nothing may be anything, too.
    out = jnp.where(reads, _grouped(out, key.shape[2]), 0).reshape(out.shape)
    return out, _by_query(lse)


@functools.partial(jax.custom_vjp, nondiff_argnames=("window", "scale", "clip", "visible_only", "return_lse"))
def closed_form_attention(
    query, key, value, roles, document_end, window, scale, clip, visible_only=False, return_lse=False
):
    """Computes ``nats_attention`` densely, with its gradient in closed form (docs/method.md 3). Shapes as in ``api``.

    Args:
      query, key, value, roles, document_end, window, scale: as in ``api.nats_attention``, all of them given.
      clip: whether ``exp(x - lse)`` of masked-out pairs is clipped at 1.
      visible_only: drop the masked-out pairs (``Visible()``).
      return_lse: return ``(out, lse [b, t, n])``.
    """
    return _closed_form_fwd(query, key, value, roles, document_end, window, scale, clip, visible_only, return_lse)[0]


def _closed_form_fwd(query, key, value, roles, document_end, window, scale, clip, visible_only, return_lse):
    key_end = roles_lib.key_end_from_roles(jnp.argmax(roles, -1), window=window, document_end=document_end)
    out, lse = interval_attention(query, key, value, key_end, scale=scale)
    return (out, lse) if return_lse else out, (query, key, value, roles, document_end, key_end, out, lse)


def _closed_form_bwd(window, scale, clip, visible_only, return_lse, residuals, cotangents):
    dout, dlse = cotangents if return_lse else (cotangents, None)
    query, key, value, roles, document_end, key_end, out, lse = residuals
    (b, length, n, _h), num_kv = query.shape, key.shape[2]
    # A row that reads nothing may have any values, and so may its gradient.
    empty = jnp.isneginf(lse)[..., None]
    query, dout = jnp.where(empty, 0, query), jnp.where(empty, 0, dout)
    logits = _logits(query, key, scale)

    def by_head(x):
        return jnp.moveaxis(x.reshape(b, length, num_kv, n // num_kv), 1, 3)[..., None]

    dlse = 0 if dlse is None else by_head(jnp.where(jnp.isneginf(lse), 0, dlse))
    lse = by_head(lse)
    index = jnp.arange(length)
    t, s = index[:, None], index[None, :]
    reach = jnp.broadcast_to(_same_document(document_end, length)[:, None], (b, num_kv, length, length))
    visible = (s <= t) & (t < key_end[:, :, None, :])
    if visible_only:
        reach &= visible

    grouped_dout = _grouped(dout, num_kv).astype(logits.dtype)
    dp = jnp.einsum("btkgh,bskh->bkgts", grouped_dout, value.astype(logits.dtype))
    delta = jnp.einsum("btkgh,btkgh->bkgt", grouped_dout, _grouped(out, num_kv).astype(logits.dtype))[..., None]
    shifted = jnp.where(jnp.isneginf(lse), -jnp.inf, logits - lse)
    ratio = jnp.exp(jnp.minimum(shifted, 0)) if clip else jnp.exp(shifted)
    e = jnp.where(reach[:, :, None], ratio * (dp - delta + dlse), 0)

    ds = jnp.where(visible[:, :, None], e, 0) * scale
    p = jnp.where(visible[:, :, None], ratio, 0)
    dquery = jnp.einsum("bkgts,bskh->btkgh", ds, key.astype(ds.dtype)).reshape(query.shape)
    dkey = jnp.einsum("bkgts,btkgh->bskh", ds, _grouped(query, num_kv).astype(ds.dtype))
    dvalue = jnp.einsum("bkgts,btkgh->bskh", p, grouped_dout)

    e = jnp.sum(e, axis=2)  # over the group: [b, k, t, s]
    ids = jnp.argmax(roles, axis=-1)
    is_global, is_local = ids == roles_lib.GLOBAL, ids == roles_lib.LOCAL
    ranges = roles_lib.role_ranges(is_global, document_end)
    n, n2 = ranges.next_global[:, :, None, :], ranges.second_global[:, :, None, :]

    def total(where, axis=2):
        return jnp.sum(jnp.where(where, e, 0), axis=axis)

    local = is_local[:, :, None, :]

    def kill_of(u):  # the definition, one token at a time: the running sum of roles.py is not used here
        ends_here = local & (n == u) & (u < ranges.end[:, :, None, :])
        taken = jnp.sum(total(ends_here & (t > n) & (t <= n2)), -1)
        across = jnp.sum(total(local & (s < u) & (t > u) & (t <= n)), -1)
        return jnp.where(is_global[:, :, u], taken, across)

    kill = jnp.moveaxis(jax.lax.map(kill_of, index), 0, 2)
    near = [total(t <= s + reach) for reach in _as_tuple(window)]
    droles = jnp.stack([total(True) - kill, total(t <= n), *near], axis=-1)
    return (
        dquery.astype(query.dtype),
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
        droles.astype(roles.dtype),
        None,
    )


closed_form_attention.defvjp(_closed_form_fwd, _closed_form_bwd)
