"""Policies that evict by the attention that keys receive, in the buffer; nothing is known in advance.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import DecodingPolicy, Eviction, check_count, cut, policy
from natsjax.policies.interval import FullAttention
from pallas_kernels.nats_attention import NO_END


class AttentionScorePolicy(DecodingPolicy, Eviction):
    """A policy that keeps ``num_keys`` keys of every head, chosen by the attention that they have received.

    A prompt is read whole, with full attention, before the first key goes, in whatever chunks it is read. A subclass
    writes ``scores``.

    Where query heads share a KV head, its keys are chosen by the sum over them. (The papers' code takes as many KV
    heads as query heads; the sum over the group is what KVPress, https://github.com/NVIDIA/kvpress, and Ada-KV,
    arXiv:2407.11550, take.)

    Attributes:
      num_keys: the most keys of a head, tokens.
    """

    observes_attention: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    num_keys: int

    @property
    def max_keys(self) -> int:
        """``num_keys``."""
        return self.num_keys

    def chunk_choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Reads everything: nothing is gone but what was evicted."""
        return FullAttention().choice(positions, config)


@policy
class H2O(AttentionScorePolicy):
    """The newest keys, and of the others those that have received the most attention in all ("heavy hitters").

    After each token the key with the least is evicted, of equal ones the oldest.

    Attributes:
      num_keys: of a head, 1 or more.
      num_recent: of them, the newest ones; the paper takes half.

    Raises:
      ValueError: a number is out of range.

    Source: arXiv:2306.14048, https://github.com/FMInference/H2O (``H2OKVCache_LayerWise``).
    """

    method: ClassVar[str] = "h2o"
    num_keys: int
    num_recent: int

    def __post_init__(self):
        check_count("num_keys", self.num_keys, 1)
        check_count("num_recent", self.num_recent, 0)
        if self.num_recent > self.num_keys:
            raise ValueError(f"num_recent={self.num_recent}: it must be between 0 and num_keys={self.num_keys}.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return {"keys": self.num_keys, "recent": self.num_recent}

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by attention received, then by age."""
        assert attention_sum is not None
        return jnp.where(key_position >= query_position - cut(self.num_recent), jnp.inf, attention_sum), key_position


@policy
class SnapKV(AttentionScorePolicy):
    """After the prompt: its last keys, and those that its last queries look at, with their neighbors.

    The keys before the observation window are chosen by the attention that its queries paid to them, each by the most
    that one of its seven neighbors among them got; of equal ones the newest stay. Generated keys are all kept.

    Attributes:
      num_keys: of a head, more than the observation window.
      observation_window: queries at the end of the prompt, whose own keys are kept.

    Raises:
      ValueError: a number is out of range.

    Source: arXiv:2404.14469, https://github.com/FasterDecoding/SnapKV; pooling as in its LongBench runs
    (``w32_k7_maxpool``).
    """

    method: ClassVar[str] = "snapkv"
    every_token: ClassVar[bool] = False
    _POOL: ClassVar[int] = 7  # keys that one is pooled over
    num_keys: int
    observation_window: int = 32

    def __post_init__(self):
        check_count("observation_window", self.observation_window, 1)
        check_count("num_keys", self.num_keys, self.observation_window + 1)

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return {"keys": self.num_keys, "observed": self.observation_window}

    @property
    def observed(self) -> int:
        """The observation window."""
        return self.observation_window

    def after_prompt(self) -> FullAttention:
        """Keeps all generated keys."""
        return FullAttention()

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by attention received by the key or a neighbor, the next in age, then by age."""
        assert attention_sum is not None
        is_before_window = key_position < query_position - cut(self.observation_window)
        is_chosen_from = (key_end > query_position) & is_before_window
        by_age = jnp.argsort(jnp.where(is_chosen_from, key_position, NO_END), axis=-1)
        # What is free or in the window is behind them then, and gives nothing.
        candidates = jnp.take_along_axis(jnp.where(is_chosen_from, attention_sum, -jnp.inf), by_age, axis=-1)
        window, strides = (1,) * (attention_sum.ndim - 1) + (self._POOL,), (1,) * attention_sum.ndim
        pooled = jax.lax.reduce_window(candidates, -jnp.inf, jax.lax.max, window, strides, "SAME")
        pooled = jnp.take_along_axis(pooled, jnp.argsort(by_age, axis=-1), axis=-1)
        return jnp.where(is_chosen_from, pooled, jnp.inf), key_position
