"""Policies that evict by the attention that keys receive.

Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.model import sharding
from natsjax.policies.base import check_count, cut, policy
from natsjax.policies.eviction import EvictingPolicy
from natsjax.policies.interval import FullAttention
from pallas_kernels.nats_attention import NO_END


class AttentionScorePolicy(EvictingPolicy):
    """An ``EvictingPolicy`` that scores keys by the attention that they have received; a subclass may write ``scores``.

    Where query heads share a KV head, its keys are chosen by the sum over them. (The papers' code takes as many KV
    heads as query heads; the sum over the group is what KVPress, https://github.com/NVIDIA/kvpress, and Ada-KV,
    arXiv:2407.11550, take.)
    """

    observes_attention: ClassVar[bool] = True


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
    num_recent: int

    def __post_init__(self):
        super().__post_init__()
        check_count("num_recent", self.num_recent, 0)
        if self.num_recent > self.num_keys:
            raise ValueError(f"num_recent={self.num_recent}: it must be between 0 and num_keys={self.num_keys}.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return super().setting | {"recent": self.num_recent}

    def scores(
        self, key_position: jax.Array, key_end: jax.Array, attention_sum: jax.Array | None, query_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores by attention received, then by age."""
        assert attention_sum is not None
        return jnp.where(key_position >= query_position - cut(self.num_recent), jnp.inf, attention_sum), key_position


@policy
class TOVA(AttentionScorePolicy):
    """The keys that the last query looks at ("token omission via attention"), the same in all heads of a layer.

    After each token the key with the least attention of its query, over all heads, is evicted, of equal ones the
    oldest; the token's own key is among them. What earlier queries looked at counts no more.

    Source: arXiv:2401.06104, https://github.com/schwartz-lab-NLP/TOVA (``TOVACache``).
    """

    method: ClassVar[str] = "tova"
    by_head: ClassVar[bool] = False
    joins_heads: ClassVar[bool] = True
    observes_last: ClassVar[bool] = True

    @property
    def observed(self) -> int:
        """The last query of a prompt."""
        return 1


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
    observation_window: int = 32

    def __post_init__(self):
        check_count("observation_window", self.observation_window, 1)
        check_count("num_keys", self.num_keys, self.observation_window + 1)

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return super().setting | {"observed": self.observation_window}

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


@policy
class AdaSnapKV(SnapKV):
    """SnapKV where the heads of a layer share a budget: ``num_keys`` of each head on average.

    Of the keys before the observation window, as many as all heads may keep together are chosen by their votes, whoever
    they belong to. A head gets that many of its own, less a fraction ``safeguard``, which all heads share equally, so
    that none is left with too little: ``(1 - safeguard) * chosen + safeguard * (num_keys - observation_window)``,
    rounded such that the heads keep as many as without sharing. Of votes alike the newest key's count first.

    Attributes:
      num_keys: of a head on average, more than the observation window.
      observation_window: as in ``SnapKV``.
      safeguard: 0 (all is shared by votes) to 1 (nothing is: ``SnapKV``).

    Raises:
      ValueError: a number is out of range.

    Source: arXiv:2407.11550 (algorithms 1 and 2), https://github.com/FFY0/AdaKV (``AdaptiveSnapKVCluster``, where it is
    ``floor_alpha``).
    """

    method: ClassVar[str] = "ada_snapkv"
    safeguard: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:  # also when it is nan
            raise ValueError(f"safeguard={self.safeguard}: it must be between 0 and 1.")

    @property
    def setting(self) -> dict[str, int | float]:
        """All three numbers."""
        return super().setting | {"safeguard": self.safeguard}

    def most_of_a_head(self, num_kv_heads: int) -> int:
        """Counts the keys of a head that gets all that is shared."""
        chosen_from = self.num_keys - self.observation_window
        share = self.safeguard + (1 - self.safeguard) * num_kv_heads
        return self.observation_window + math.ceil(share * chosen_from)

    def head_budgets(self, scores: tuple[jax.Array, jax.Array], is_live: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns what each head keeps with the observation window, int32 ``[b, k]``."""
        votes, age = (sharding.whole(x, "kv_heads", 1) for x in scores)
        is_live = sharding.whole(is_live, "kv_heads", 1)
        is_chosen_from = is_live & (votes < jnp.inf)
        # More than there are slots is as good as all of them, and would not fit in int32 over all heads.
        count = jnp.minimum(cut(self.num_keys) - cut(self.observation_window), votes.shape[-1])
        chosen = _most_wanted(votes, age, is_chosen_from, count)
        kept = jnp.sum(is_live & ~is_chosen_from, axis=-1, dtype=jnp.int32)
        return sharding.own_part(kept + _shared(chosen, count, self.safeguard), "kv_heads", 1)


def _most_wanted(votes: jax.Array, age: jax.Array, is_chosen_from: jax.Array, count: jax.Array) -> jax.Array:
    """Counts each head's keys among those with the most votes, of all heads together: int32 ``[b, k]``.

    Args:
      votes, age: ``[b, k, c]``; of votes alike the largest age counts first, then the first head's.
      is_chosen_from: bool ``[b, k, c]``.
      count: int32 scalar, keys of a head on average.
    """
    b, k, c = votes.shape
    head = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[:, None], votes.shape)
    flat = (x.reshape(b, k * c) for x in (~is_chosen_from, -votes, -age, head))
    is_other, _, _, head = jax.lax.sort(tuple(flat), num_keys=4)
    is_chosen = ~is_other & (jnp.arange(k * c) < k * count)
    return jnp.sum(is_chosen[:, None] & (head[:, None] == jnp.arange(k)[:, None]), axis=-1, dtype=jnp.int32)


def _shared(chosen: jax.Array, count: jax.Array, safeguard: float | jax.Array) -> jax.Array:
    """Mixes the numbers that were chosen of each head, int32 ``[b, k]``, with ``count``; the sum is ``k * count``.

    Fractions are rounded down, and the heads with the largest ones get one more, the first of equal ones.
    """
    heads = chosen.shape[1]
    exact = (1 - safeguard) * chosen + safeguard * count
    whole = jnp.floor(exact)
    left = heads * count - jnp.sum(whole, axis=1, keepdims=True)
    place = jnp.argsort(jnp.argsort(whole - exact, axis=1, stable=True), axis=1)
    return (whole + (place < left)).astype(jnp.int32)
