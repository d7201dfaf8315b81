"""Rules for the live key that goes first where a head may keep no more."""

import jax
import jax.numpy as jnp

from natsjax.policies.base import Eviction, policy
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
