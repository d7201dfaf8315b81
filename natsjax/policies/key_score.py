"""Policies that evict by the keys themselves: no attention is recorded, nothing is known in advance.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot, ``h`` head dim.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import DecodingPolicy, Eviction, check_count, policy
from natsjax.policies.interval import FullAttention


class KeyScorePolicy(DecodingPolicy, Eviction):
    """A policy that keeps ``num_keys`` keys of every head, chosen by a score of the keys in the buffer.

    After each token the key with the lowest score is evicted, of equal ones the oldest; the new one is among them. A
    prompt is read whole, with full attention, before the first key goes. A subclass writes ``weights``, the score.

    Attributes:
      num_keys: the most keys of a head, tokens.
    """

    by_head: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True
    num_keys: int

    def __post_init__(self):
        check_count("num_keys", self.num_keys, 1)

    @property
    def setting(self) -> dict[str, int | float]:
        """The number of keys."""
        return {"keys": self.num_keys}

    @property
    def max_keys(self) -> int:
        """``num_keys``."""
        return self.num_keys

    def chunk_choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Reads everything: nothing is gone but what was evicted."""
        return FullAttention().choice(positions, config)

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by ``weights``, then by age."""
        assert attention_sum is not None
        return attention_sum, key_position


@policy
class KeyNorm(KeyScorePolicy):
    """The keys of the lowest L2 norm, which are those that attract attention.

    All layers are treated alike. (The paper's code can leave some whole, and does so with the first two of Llama.)

    Attributes:
      num_keys: of a head, 1 or more.

    Raises:
      ValueError: the number is out of range.

    Source: arXiv:2406.11430, https://github.com/alessiodevoto/l2compress (``l2_compress``).
    """

    method: ClassVar[str] = "knorm"
    num_keys: int

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns the norms, negative."""
        return -jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)


@policy
class KeyDiff(KeyScorePolicy):
    """The keys that differ most from the others: the least like the mean direction of all keys in the buffer.

    The mean is that of the normalized keys, likeness the cosine. (The paper reads prompts in blocks, and evicts after
    each; here they are read whole.)

    Attributes:
      num_keys: of a head, 1 or more.

    Raises:
      ValueError: the number is out of range.

    Source: arXiv:2504.15364.
    """

    method: ClassVar[str] = "keydiff"
    num_keys: int

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns the cosines with the mean, negative."""
        keys = jnp.where(is_live[..., None], keys, 0).astype(jnp.float32)
        direction = _normalized(keys)
        mean = _normalized(jnp.sum(direction, axis=2, keepdims=True))  # whose length no cosine depends on
        return -jnp.sum(direction * mean, axis=-1)


def _normalized(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1, norm)
