"""Eviction of live keys where a head may keep no more: rules for ``max_kv``, and what policies that evict share.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import DecodingPolicy, Eviction, check_count, policy
from natsjax.policies.interval import FullAttention
from pallas_kernels.nats_attention import NO_END


@policy
class SoonestEnd(Eviction):
    """Eviction of the smallest ``key_end``: SLIDING, LOCAL, GLOBAL; of equal ones the oldest, the first key last."""

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``Eviction``."""
        is_first = key_position == 0
        return jnp.where(is_first, NO_END, key_end), jnp.where(is_first, NO_END, key_position)


@policy
class Oldest(Eviction):
    """Eviction of the oldest key but the first of the sequence."""

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``Eviction``."""
        return jnp.where(key_position == 0, NO_END, key_position), key_end


EVICTIONS: dict[str, Eviction] = {"soonest_end": SoonestEnd(), "oldest": Oldest()}
"""By name, for ``max_kv``."""


@policy
class EvictingPolicy(DecodingPolicy, Eviction):
    """A policy that keeps ``num_keys`` keys of every head, those with the highest scores.

    A prompt is read whole, with full attention and in whatever chunks, before the first key goes. After each later
    token the key with the lowest score is evicted, of equal ones the oldest; the token's own key is among them.

    A subclass has a ``method``, and says what keys are scored by. Where that is more than the attention that they have
    received (``observes_attention``) or their ``weights`` (``reads_keys``), it writes ``scores``.

    Attributes:
      num_keys: of a head, 1 or more.

    Raises:
      ValueError: a number is out of range.
    """

    by_head: ClassVar[bool] = True
    num_keys: int

    def __post_init__(self):
        check_count("num_keys", self.num_keys, 1)

    @property
    def setting(self) -> dict[str, int | float]:
        """The number of keys."""
        return {"keys": self.num_keys}

    @property
    def eviction(self) -> Eviction:
        """The policy itself."""
        return self

    def most_of_a_head(self, num_kv_heads: int) -> int:
        """Returns ``num_keys``."""
        return self.num_keys

    def chunk_choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Reads everything: nothing is gone but what was evicted."""
        return FullAttention().choice(positions, config)

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by attention received, or by ``weights``, then by age."""
        assert attention_sum is not None
        return attention_sum, key_position
