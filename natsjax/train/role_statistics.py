"""Statistics of a batch's roles, as sums that add up over microbatches and devices: for people, not for the loss.

Axis letters: ``l`` layer, ``b`` batch, ``k`` KV head, ``s`` token, ``t`` query, ``m`` thresholds,
``r`` role.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.kv_fraction import sliding_windows
from natsjax.model import sharding
from natsjax.model.inputs import Batch
from pallas_kernels.nats_attention.roles import GLOBAL, LOCAL, SLIDING

_NUM_THRESHOLDS = 64

QUANTILES = (0.5, 0.9, 0.99, 1.0)
"""Quantiles that are reported of the number of keys that queries read."""


class RoleSums(NamedTuple):
    """Sums over the tokens that are not padding, float32.

    Attributes:
      counts: ``[l, k, r]``, tokens by role.
      unended: ``[l, k]``, LOCAL tokens that no GLOBAL one ends within their document.
      more_live: ``[l, m]``, queries of all KV heads that read more keys than each of ``live_thresholds``.
    """

    counts: jax.Array
    unended: jax.Array
    more_live: jax.Array


def live_thresholds(length: int) -> np.ndarray:
    """Returns the thresholds of ``RoleSums.more_live``, int32 ``[m]``: geometric, from 1 to ``length``."""
    return np.unique(np.geomspace(1, length, _NUM_THRESHOLDS).round()).astype(np.int32)


def role_sums(ids: jax.Array, batch: Batch, config: Config) -> RoleSums:
    """Sums over a batch, on any mesh.

    Args:
      ids: int8 ``[l, b, k, s]``, roles; those of a "dense" layer are all GLOBAL, those of a "sliding" one SLIDING.
      batch: the documents.
      config: for the windows of the layers.
    """
    thresholds = jnp.asarray(live_thresholds(ids.shape[-1]))
    windows = jnp.asarray(sliding_windows(config))

    def local(ids, windows, is_token, is_first, document_end):
        valid = is_token[:, None]

        def layer(ids, windows):
            live = live_keys(ids, is_first, windows)
            of_role = [jnp.sum((ids == role) & valid, axis=(0, 2)) for role in range(config.nats.num_roles)]
            counts = jnp.stack(of_role, axis=-1)
            more = jnp.sum((live[..., None] > thresholds) & valid[..., None], axis=(0, 1, 2))  # one fused pass
            sums = counts, jnp.sum(_unended(ids, document_end) & valid, axis=(0, 2)), more
            return tuple(x.astype(jnp.float32) for x in sums)

        counts, unended, more = jax.lax.map(lambda x: layer(*x), (ids, windows))
        return (
            sharding.psum(counts, "batch"),
            sharding.psum(unended, "batch"),
            sharding.psum(more, "batch", "kv_heads"),
        )

    # Whole sequences, as small integers, as for the lifetimes.
    of_heads = (None, "kv_heads" if windows.shape[1] > 1 else None, None)
    axes = ((None, "batch", "kv_heads", None), of_heads, *(("batch", None),) * 3)
    out_axes: list[sharding.Axes] = [(None, "kv_heads", None), (None, "kv_heads"), (None, None)]
    mapped = sharding.shard_map(local, axes, out_axes)
    return RoleSums(*mapped(ids, windows, batch.is_token, batch.is_first, batch.document_end))


def live_keys(ids: jax.Array, is_first: jax.Array, windows: jax.Array) -> jax.Array:
    """Counts the keys that each query reads, in O(s): running sums, without a scatter, which TPUs are slow at.

    Args:
      ids: int8 ``[b, k, s]``.
      is_first: bool ``[b, s]``, the first token of each document.
      windows: queries behind its own that read a key of each SLIDING role; int32 ``[k, r - 2]`` or, for all heads,
        ``[1, r - 2]``.

    Returns:
      int32 ``[b, k, t]``; meaningless where padded.
    """
    length = ids.shape[-1]
    start = is_first[:, None, :]

    def up_to(role):
        return jnp.cumsum(ids == role, axis=-1, dtype=jnp.int32)

    def before(count, at):  # the count before the latest index that is marked
        earlier = jnp.concatenate([jnp.zeros_like(count[..., :1]), count[..., :-1]], axis=-1)
        return jax.lax.cummax(jnp.where(at, earlier, 0), axis=count.ndim - 1)

    globals_, locals_ = up_to(GLOBAL), up_to(LOCAL)
    # A LOCAL key is read up to the next GLOBAL token, that one's own query included.
    behind_global = jnp.concatenate([jnp.zeros_like(ids[..., :1], bool), ids[..., :-1] == GLOBAL], axis=-1)
    live = globals_ - before(globals_, start) + locals_ - before(locals_, start | behind_global)
    for role, of_heads in enumerate(jnp.minimum(windows, length).T, SLIDING):
        sliding = up_to(role)
        padded = jnp.concatenate([jnp.zeros((*sliding.shape[:-1], length + 1), jnp.int32), sliding], axis=-1)
        heads = [padded] if len(of_heads) == 1 else jnp.split(padded, len(of_heads), axis=1)
        run_out = jnp.concatenate(
            [
                jax.lax.dynamic_slice_in_dim(values, length - window, length, axis=-1)
                for values, window in zip(heads, of_heads, strict=True)
            ],
            axis=1,
        )
        live += sliding - jnp.maximum(run_out, before(sliding, start))
    return live


def _unended(ids: jax.Array, document_end: jax.Array) -> jax.Array:
    """Marks, bool ``[b, k, s]``, LOCAL tokens with no GLOBAL token after them in their document."""
    length = ids.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    at_or_after = jax.lax.cummin(jnp.where(ids == GLOBAL, index, length), axis=ids.ndim - 1, reverse=True)
    return (ids == LOCAL) & (at_or_after >= document_end[:, None, :])


def live_quantiles(more_live: jax.Array, num_queries: jax.Array, length: int) -> jax.Array:
    """Returns quantiles of the number of keys that a query reads, rounded up to the next threshold.

    Args:
      more_live: float32 ``[l, m]``, of ``RoleSums``.
      num_queries: float32 scalar, queries of all KV heads.
      length: tokens in a context.

    Returns:
      float32 ``[l, q]``, for each of ``QUANTILES``.
    """
    fraction = more_live / num_queries
    allowed = 1 - jnp.asarray(QUANTILES, jnp.float32) + 1e-7
    first = jnp.argmax(fraction[:, None, :] <= allowed[:, None], axis=-1)
    return jnp.asarray(live_thresholds(length), jnp.float32)[first]
