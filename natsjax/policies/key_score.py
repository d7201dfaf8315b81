"""Policies that evict by the keys themselves: no attention is recorded.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot, ``h`` head dim.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.policies.base import policy
from natsjax.policies.eviction import EvictingPolicy


class KeyScorePolicy(EvictingPolicy):
    """An ``EvictingPolicy`` that scores the keys in the buffer; a subclass writes ``weights``, the score."""

    reads_keys: ClassVar[bool] = True


@policy
class KeyNorm(KeyScorePolicy):
    """The keys of the lowest L2 norm, which are those that attract attention.

    All layers are treated alike. (The paper's code can leave some whole, and does so with the first two of Llama.)

    Source: arXiv:2406.11430, https://github.com/alessiodevoto/l2compress (``l2_compress``).
    """

    method: ClassVar[str] = "knorm"

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns the norms, negative."""
        return -jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)


@policy
class KeyDiff(KeyScorePolicy):
    """The keys that differ most from the others: the least like the mean direction of all keys in the buffer.

    The mean is that of the normalized keys, likeness the cosine. (The paper reads prompts in blocks, and evicts after
    each; here they are read whole.)

    Source: arXiv:2504.15364.
    """

    method: ClassVar[str] = "keydiff"

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns the cosines with the mean, negative."""
        keys = jnp.where(is_live[..., None], keys, 0).astype(jnp.float32)
        direction = _normalized(keys)
        mean = _normalized(jnp.sum(direction, axis=2, keepdims=True))  # whose length no cosine depends on
        return -jnp.sum(direction * mean, axis=-1)


def _normalized(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1, norm)
