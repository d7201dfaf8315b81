"""Scorer logits to roles, roles to lifetimes, and the KV penalty of lifetimes.

Pure functions; ``docs/method.md`` 2 and 4 define them. Axis letters: ``b`` batch, ``k`` KV head, ``s`` key index.
Roles are 0 GLOBAL, 1 LOCAL, 2 SLIDING; with several windows 3, 4, … are SLIDING
roles too, and ``r`` counts the roles.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from natsjax.config import NatsConfig
from pallas_kernels.nats_attention import roles as roles_lib
from pallas_kernels.nats_attention.roles import GLOBAL, LOCAL


class TokenRoles(NamedTuple):
    """Roles of a layer's tokens, chosen once: attention reads ``one_hot``, lifetimes ``key_end``, statistics ``ids``.

    Attributes:
      ids: int8 ``[b, k, s]``, GLOBAL, LOCAL or SLIDING.
      one_hot: float32 ``[b, k, s, r]``, the same with a gradient (``straight_through``).
      key_end: int32 ``[b, k, s]``, the first query that cannot read each key, at most the end of its document.
    """

    ids: jax.Array
    one_hot: jax.Array
    key_end: jax.Array


def scorer_bias(fractions: tuple[float, ...]) -> jax.Array:
    """Returns biases float32 ``[r]`` under which Gumbel sampling draws the roles in the given fractions."""
    return jnp.log(jnp.asarray(fractions, jnp.float32))


def noise_at(step: jax.Array, config: NatsConfig, num_steps: int) -> jax.Array:
    """Returns the scale of the Gumbel noise, float32 scalar; it has its last value from ``nats.noise_end`` on."""
    begin, length = config.noise_end - config.noise_decay_fraction, max(config.noise_decay_fraction, 1e-6)
    progress = jnp.clip((step / max(1, num_steps - 1) - begin) / length, 0.0, 1.0)
    return jnp.float32(config.noise + (config.final_noise - config.noise) * progress)


def role_bias_logits(
    role_bias: float | jax.Array,
    roles: Literal["by_sign", "global", "global_local"],
    windows: Sequence[int] = (0,),
    length: int = 1,
) -> jax.Array:
    """Returns the vector that the role bias adds to the logits, float32 ``[r]``: ``(δ, 0, 0)``, or ``(δ, δ, 0)``.

    More GLOBAL tokens keep more, but fewer do not keep less: LOCAL keys then live longer. So "by_sign", δ above 0 goes
    to GLOBAL alone, and below 0 to both (docs/choices.md).

    With several windows a longer one has a fraction of δ, by the logarithm of its lifetime between that of the shortest
    window, 0, and that of a whole context, 1.

    Args:
      role_bias: δ.
      roles: those that get all of it.
      windows: ``nats.sliding_windows``, tokens.
      length: of a context, tokens.
    """
    shortest, *longer = (math.log1p(min(window, length)) for window in windows)
    whole = max(math.log1p(length) - shortest, 1e-6)
    delta = jnp.asarray(role_bias, jnp.float32)
    local = {"by_sign": jnp.minimum(delta, 0.0), "global": jnp.zeros_like(delta), "global_local": delta}[roles]
    return jnp.stack([delta, local, jnp.zeros_like(delta), *(delta * (x - shortest) / whole for x in longer)])


def choose_roles(logits: jax.Array, is_first: jax.Array) -> jax.Array:
    """Chooses the role of the largest logit, GLOBAL for the first token of each document.

    Args:
      logits: float32 ``[b, k, s, r]``, noise or bias already added.
      is_first: bool ``[b, s]``.

    Returns:
      int8 ``[b, k, s]``.
    """
    return jnp.where(is_first[:, None, :], GLOBAL, jnp.argmax(logits, axis=-1)).astype(jnp.int8)


@jax.custom_vjp
def _hard(soft: jax.Array, role_ids: jax.Array) -> jax.Array:
    return jax.nn.one_hot(role_ids, soft.shape[-1], dtype=soft.dtype)


# One-hot forward, the softmax backward: exactly one-hot, which `soft + stop_gradient(hard - soft)` is not in floats.
_hard.defvjp(lambda soft, role_ids: (_hard(soft, role_ids), None), lambda _, gradient: (gradient, None))


def straight_through(
    logits: jax.Array, role_ids: jax.Array, is_first: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """Returns the roles as one-hot vectors with the gradient of ``softmax(logits / temperature)``.

    The roles are an argument, so that a recomputed forward uses the very roles of the first one whatever its logits
    round to. First tokens of documents are constants.

    Args:
      logits: float32 ``[b, k, s, r]``, Gumbel noise already added.
      role_ids: int8 ``[b, k, s]``.
      is_first: bool ``[b, s]``.
      temperature: of the softmax.

    Returns:
      float32 ``[b, k, s, r]``.

    Source: arXiv:2502.13251, section 3.2.
    """
    soft = jax.nn.softmax(logits / temperature, axis=-1)
    return _hard(jnp.where(is_first[:, None, :, None], jax.lax.stop_gradient(soft), soft), role_ids)


def lifetimes(key_end: jax.Array, document_end: jax.Array) -> jax.Array:
    """Counts the queries that can read each key.

    Args:
      key_end: int32 ``[b, k, s]``, exclusive.
      document_end: int32 ``[b, s]``, exclusive; 0 marks padding.

    Returns:
      int32 ``[b, k, s]``; 0 where padded.
    """
    index = jnp.arange(key_end.shape[-1], dtype=jnp.int32)
    return jnp.maximum(jnp.minimum(key_end, document_end[:, None, :]) - index, 0)


@functools.partial(jax.custom_vjp, nondiff_argnames=("windows", "kv_penalty_gradient"))
def lifetime_sum(
    roles: TokenRoles,
    document_end: jax.Array,
    windows: tuple[int, ...],
    kv_penalty_gradient: Literal["constant", "exact"],
) -> jax.Array:
    """Sums all lifetimes per KV head, differentiable in ``roles.one_hot``.

    Args:
      roles: of the layer, whole sequences.
      document_end: int32 ``[b, s]``, exclusive; 0 marks padding.
      windows: ``nats.sliding_windows``, tokens.
      kv_penalty_gradient: "constant" holds lifetimes constant: a role costs the lifetime that it gives to its own key.
        "exact" is the gradient of the relaxed mask's sum: a GLOBAL token also earns what it takes from the LOCAL keys
        before it.

    Returns:
      float32 ``[k]``, in key-query pairs.
    """
    return jnp.sum(lifetimes(roles.key_end, document_end), axis=(0, 2), dtype=jnp.float32)


def _lifetime_sum_fwd(roles, document_end, windows, kv_penalty_gradient):
    witness = jnp.zeros((), roles.one_hot.dtype)
    return lifetime_sum(roles, document_end, windows, kv_penalty_gradient), (roles.ids, witness, document_end)


def _lifetime_sum_bwd(windows, kv_penalty_gradient, residuals, gradient):
    role_ids, witness, document_end = residuals
    is_global, is_local = role_ids == GLOBAL, role_ids == LOCAL
    ranges = roles_lib.role_ranges(is_global, document_end)
    length = role_ids.shape[2]
    index = jnp.arange(length, dtype=jnp.int32)

    def count(first, last):  # queries first … last - 1
        return jnp.maximum(last - first, 0).astype(jnp.float32)

    as_global = count(index, ranges.end)
    as_local = count(index, jnp.minimum(ranges.next_global + 1, ranges.end))
    reaches = (min(window, length) for window in windows)  # a longer window is the same, and int32 has an end
    as_sliding = [count(index, jnp.minimum(index + reach + 1, ranges.end)) for reach in reaches]
    if kv_penalty_gradient == "exact":
        alive = is_local & (index < ranges.end)
        # A query's row holds the LOCAL keys behind it: those since the last GLOBAL token, itself included as a query.
        earlier = _local_keys_read_by(alive, is_global, document_end)
        as_global -= roles_lib.global_credit(
            is_global,
            column=jnp.where(alive, as_local - 1, 0),
            row=earlier,
            past=jnp.where(
                alive,
                count(
                    jnp.minimum(ranges.next_global + 1, ranges.end), jnp.minimum(ranges.second_global + 1, ranges.end)
                ),
                0,
            ),
            document_end=document_end,
        )
    droles = jnp.stack([as_global, as_local, *as_sliding], axis=-1)
    droles = (droles * gradient[None, :, None, None]).astype(witness.dtype)
    return TokenRoles(None, droles, None), None  # type: ignore[arg-type]


def _local_keys_read_by(is_local: jax.Array, is_global: jax.Array, document_end: jax.Array) -> jax.Array:
    """Counts the LOCAL keys before each query that it reads: float32 ``[b, k, t]``."""
    start = jnp.concatenate(
        [jnp.ones_like(document_end[:, :1], bool), document_end[:, 1:] != document_end[:, :-1]], axis=-1
    )
    before = jnp.cumsum(is_local, axis=-1, dtype=jnp.int32) - is_local.astype(jnp.int32)
    # Keys before the document, or before the GLOBAL token that the query lies behind, are gone.
    behind_global = jnp.concatenate([jnp.zeros_like(is_global[..., :1]), is_global[..., :-1]], axis=-1)
    gone = jnp.where(start[:, None, :] | behind_global, before, 0)
    return (before - jax.lax.cummax(gone, axis=gone.ndim - 1)).astype(jnp.float32)


lifetime_sum.defvjp(_lifetime_sum_fwd, _lifetime_sum_bwd)
