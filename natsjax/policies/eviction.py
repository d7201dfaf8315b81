"""Which live key goes first where a buffer is full."""

import jax
import jax.numpy as jnp

from natsjax.policies.base import policy
from pallas_kernels.nats_attention import NO_END


@policy
class SoonestEnd:
    """The key whose last reader comes first: SLIDING, LOCAL, GLOBAL; of those alike the oldest, the first one last."""

    def order(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``natsjax.decode.buffer.Eviction``."""
        is_first = key_position == 0
        return jnp.where(is_first, NO_END, key_end), jnp.where(is_first, NO_END, key_position)


@policy
class Oldest:
    """The oldest key but the first of the sequence."""

    def order(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``natsjax.decode.buffer.Eviction``."""
        return jnp.where(key_position == 0, NO_END, key_position), key_end


EVICTIONS: dict[str, SoonestEnd | Oldest] = {"soonest_end": SoonestEnd(), "oldest": Oldest()}
"""By name, for ``max_kv``."""
