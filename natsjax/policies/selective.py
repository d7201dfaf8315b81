"""The keys that the queries of "selective" layers have masked least.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.config import Config, ModelConfig
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import cut, policy
from natsjax.policies.eviction import EvictingPolicy
from natsjax.policies.interval import FullAttention


@policy
class LeastMasked(EvictingPolicy):
    """The keys of a "selective" layer with the smallest masks, the same ones in all heads; other layers keep theirs.

    After each token the key with the largest mask is dropped, of equal ones the oldest; the first key stays.

    Source: arXiv:2410.02703 (``natsjax.model.selective``).
    """

    method: ClassVar[str] = "selective"
    needs_selective: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Keeps ``num_keys`` of the keys to the end of their document."""
        rule = FullAttention().choice(positions, config)
        return rule._replace(num_keys=jnp.asarray(cut(self.num_keys), jnp.int32))

    def limited_layers(self, model: ModelConfig) -> tuple[bool, ...]:
        """Marks the "selective" layers."""
        return tuple(kind == "selective" for kind in model.all_layer_types)

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by the mask, then by age."""
        assert attention_sum is not None
        return jnp.where(key_position == 0, jnp.inf, -attention_sum), key_position
