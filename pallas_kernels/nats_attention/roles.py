"""From roles to the interval of queries that can read each key, and the credit a GLOBAL token gets for ending others.

Axis letters: ``b`` batch, ``k`` KV head, ``s`` key index, ``t`` query index. Everything here is O(L) per head.

Source: "Neural Attention Search", arXiv:2502.13251, sections 3.1-3.2; the range sums are this project's own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import checked_window

GLOBAL, LOCAL, SLIDING = 0, 1, 2
"""The roles; with several windows ``SLIDING`` is the role of the first, and each other window has the next number."""
NO_END = int(np.iinfo(np.int32).max)
"""``key_end`` of a key that every later query can read; as a query's position, that of one that reads nothing."""
NEVER = int(np.iinfo(np.int32).min)
"""``key_end`` of a key that nobody reads, wherever its position and the query's are."""


def num_roles(num_windows: int) -> int:
    """Returns the number of roles: GLOBAL, LOCAL, and a SLIDING role for each window."""
    return SLIDING + num_windows


class RoleRanges(NamedTuple):
    """The first rows (queries) at which each key's possible lifetimes end; all int32 ``[b, k, s]``, cut to ``end``.

    Attributes:
      end: first query index behind the key's document.
      next_global: ``n(s)``, the first GLOBAL token behind the key in its document, ``end`` if there is none.
      second_global: ``n2(s)``, the first GLOBAL token behind ``n(s)`` in the document, ``end`` if there is none.
    """

    end: jax.Array
    next_global: jax.Array
    second_global: jax.Array


class RoleColumns(NamedTuple):
    """Properties of each key that the role sums depend on; int32 or bool ``[b, k, s]``.

    Attributes:
      key_end: first query that cannot read the key.
      reach: first query that no sum looks at: the end of the key's document.
      next_global, second_global: as in ``RoleRanges``.
      is_global, is_local: the key's role.
    """

    key_end: jax.Array
    reach: jax.Array
    next_global: jax.Array
    second_global: jax.Array
    is_global: jax.Array
    is_local: jax.Array


class RoleSums(NamedTuple):
    """Sums of ``e[t, s]`` over queries t (``row``: over keys s), float32 ``[b, k, s]`` (``row``: ``[b, k, t]``).

    Attributes:
      all: over ``t = s … reach - 1``.
      own: over ``t = s``.
      local: over ``t = s+1 … n(s)``.
      sliding: over ``t = s … s + window``, an array for each window.
      past: for LOCAL keys, over ``t = n(s)+1 … n2(s)``.
      row: over visible LOCAL keys ``s < t``.
    """

    all: jax.Array
    own: jax.Array
    local: jax.Array
    sliding: tuple[jax.Array, ...]
    past: jax.Array
    row: jax.Array

    def map_keys(self, function: Callable[[jax.Array], jax.Array]) -> "RoleSums":
        """Applies a function to all sums but ``row``."""
        sliding = tuple(map(function, self.sliding))
        every, own, local, past = map(function, (self.all, self.own, self.local, self.past))
        return RoleSums(every, own, local, sliding, past, self.row)


def _following_global(is_global: jax.Array) -> jax.Array:
    """Returns the index of the first GLOBAL token after each index, ``L`` if there is none: int32, same shape."""
    length = is_global.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    at_or_after = jax.lax.cummin(jnp.where(is_global, index, length), axis=is_global.ndim - 1, reverse=True)
    return jnp.concatenate([at_or_after[..., 1:], jnp.full_like(at_or_after[..., :1], length)], axis=-1)


def role_ranges(is_global: jax.Array, document_end: jax.Array | None) -> RoleRanges:
    """Returns the ranges that lifetimes and role gradients are sums over.

    Args:
      is_global: bool ``[b, k, s]``.
      document_end: int32 ``[b, s]``, exclusive index of the end of each token's document (0: padding), or None for
        one document that fills the sequence.

    Returns:
      ``RoleRanges`` of int32 ``[b, k, s]``.
    """
    length = is_global.shape[-1]
    following = _following_global(is_global)
    if document_end is None:
        end = jnp.full_like(following, length)
    else:
        end = jnp.broadcast_to(jnp.minimum(document_end, length)[:, None, :], following.shape).astype(jnp.int32)
    padded = jnp.concatenate([following, jnp.full_like(following[..., :1], length)], axis=-1)
    second = jnp.take_along_axis(padded, following, axis=-1)
    next_global = jnp.minimum(following, end)
    return RoleRanges(end, next_global, jnp.where(following < end, jnp.minimum(second, end), end))


def key_end_from_roles(
    role_ids: jax.Array, *, window: int | jax.Array | Sequence[int | jax.Array], document_end: jax.Array | None = None
) -> jax.Array:
    """Returns the first query that cannot read each key any more.

    Args:
      role_ids: int ``[b, k, s]``: 0 GLOBAL, 1 LOCAL, 2 SLIDING, and with several windows 3, 4, … for the others.
      window: queries after its own that can read a SLIDING key, 0 or more, or one such number for each SLIDING role;
        each may be traced, and an int32 array that is broadcast against ``role_ids``. One beyond int32 is none at all.
      document_end: int32 ``[b, s]``, exclusive; 0 marks padding. None: one document.

    Returns:
      int32 ``[b, k, s]``, exclusive; ``NO_END`` for a key that nothing ends, 0 for padding.

    Raises:
      ValueError: a negative window (a traced one counts as 0).

    Example:
      >>> key_end_from_roles(jnp.array([[[1, 2, 0, 1, 2, 2]]]), window=1)  # L S G L S S
      [[[3, 3, NO_END, NO_END, 6, 7]]]
    """
    length = role_ids.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    following = _following_global(role_ids == GLOBAL)
    local_end = jnp.where(following < length, following + 1, NO_END)
    key_end = jnp.where(role_ids == LOCAL, local_end, NO_END)
    longest = NO_END - length  # a longer one is the same, and int32 has an end
    for role, given in enumerate(window if isinstance(window, Sequence) else [window], SLIDING):
        if isinstance(given, jax.Array):
            given = jnp.clip(given, 0, longest)
        else:
            given = min(checked_window(given), longest)
        key_end = jnp.where(role_ids == role, index + given + 1, key_end)
    if document_end is not None:
        key_end = jnp.minimum(key_end, document_end[:, None, :])
    return key_end.astype(jnp.int32)


def global_credit(
    is_global: jax.Array,
    *,
    column: jax.Array,
    row: jax.Array,
    past: jax.Array,
    document_end: jax.Array | None,
) -> jax.Array:
    """Computes what making each token GLOBAL takes from the LOCAL keys before it (``K`` in docs/method.md 3).

    The sums are of any quantity ``e[t, s]`` over (query, key) pairs of LOCAL keys; outside LOCAL keys they are 0.
    A token that is not GLOBAL would end the LOCAL keys that are alive across it: those whose pairs begin before it
    less those whose queries come no later, a running sum. A GLOBAL token already ends its keys: it takes the rows up
    to the next GLOBAL token that they would have had without it. Both sums start anew behind every GLOBAL token,
    where they are exactly zero, so that rounding does not build up over the sequence.

    Args:
      is_global: bool ``[b, k, s]``.
      column: float32 ``[b, k, s]``: for LOCAL keys the sum of e over ``t = s+1 … n(s)``.
      row: float32 ``[b, k, t]``: the sum of e over visible LOCAL keys ``s < t``.
      past: float32 ``[b, k, s]``: for LOCAL keys the sum of e over ``t = n(s)+1 … n2(s)``.
      document_end: int32 ``[b, s]`` or None, as in ``role_ranges``.

    Returns:
      float32 ``[b, k, s]``.
    """

    def previous(x):
        return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)

    starts = previous(is_global)
    if document_end is not None:
        # Where nothing before is read any more. Of documents side by side that is where each begins.
        last_end = jax.lax.cummax(previous(document_end), axis=document_end.ndim - 1)
        starts |= (last_end <= jnp.arange(document_end.shape[-1], dtype=jnp.int32))[:, None, :]
    steps = jnp.stack([previous(column) - row, previous(past)])

    def combine(left, right):
        left_starts, left_sum = left
        right_starts, right_sum = right
        return left_starts | right_starts, jnp.where(right_starts, right_sum, left_sum + right_sum)

    starts = jnp.broadcast_to(starts, steps.shape)
    _, (alive, taken) = jax.lax.associative_scan(combine, (starts, steps), axis=-1)
    return jnp.where(is_global, taken, alive)


def role_columns(role_ids: jax.Array, key_end: jax.Array, document_end: jax.Array | None) -> RoleColumns:
    """Returns the properties of each key for the role sums; ``role_ids``, ``key_end`` int ``[b, k, s]``."""
    is_global = role_ids == GLOBAL
    ranges = role_ranges(is_global, document_end)
    return RoleColumns(key_end, *ranges, is_global, role_ids == LOCAL)


def role_gradient(sums: RoleSums, columns: RoleColumns, document_end: jax.Array | None) -> jax.Array:
    """Computes the gradient of the relaxed roles (docs/method.md 3) from their sums: float32 ``[b, k, s, r]``."""
    credit = global_credit(
        columns.is_global,
        column=jnp.where(columns.is_local, sums.local, 0),
        row=sums.row,
        past=sums.past,
        document_end=document_end,
    )
    return jnp.stack([sums.all - credit, sums.own + sums.local, *sums.sliding], axis=-1)
