"""Policies that look at indices alone: full attention, windows, sinks, random keys."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import DecodingPolicy, check_count, check_seed, cut, policy, window_end
from pallas_kernels.nats_attention import NO_END


class IntervalPolicy(DecodingPolicy):
    """A policy that fixes who reads a key from its position in the document alone; a subclass writes ``key_end``."""

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns the first position of the document that cannot read each key.

        Every query reads at least its own key: ``key_end > positions``.

        Args:
          positions: int32 ``[b, s]``, distance to the start of the document.
          num_kv_heads: k.

        Returns:
          int32 ``[b, 1, s]`` or ``[b, k, s]``, ``NO_END`` for a key that every later query reads.
        """
        raise NotImplementedError

    def choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Takes ``key_end`` in place of roles."""
        return RoleSampling(key_end=self.key_end(positions, config.model.num_kv_heads))

    chunk_choice = choice

    def most_live(self, length: int, num_kv_heads: int) -> int:
        """Counts, from ``key_end``, the most keys of a head that are live at once in ``length`` tokens."""
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        ends = np.asarray(self.key_end(positions, num_kv_heads)).reshape(-1, length)
        most = 0
        for end in ends:
            ended = np.bincount(np.minimum(end, length), minlength=length + 1)
            most = max(most, int(np.max(1 + np.arange(length) - np.cumsum(ended)[:length])))
        return most


@policy
class FullAttention(IntervalPolicy):
    """Full attention: every key lives to the end of its document."""

    method: ClassVar[str] = "full"

    @property
    def setting(self) -> dict[str, int | float]:
        """No number."""
        return {}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns ``NO_END``, int32 ``[b, 1, s]``."""
        return jnp.full_like(positions, NO_END)[:, None, :]


@policy
class SlidingWindow(IntervalPolicy):
    """A sliding window: a key lives for its own query and the ``window`` queries after it.

    Attributes:
      window: tokens, 0 or more.

    Raises:
      ValueError: the window is negative.
    """

    method: ClassVar[str] = "sliding_window"
    window: int

    def __post_init__(self):
        check_count("window", self.window, 0)

    @property
    def setting(self) -> dict[str, int | float]:
        """The window."""
        return {"window": self.window}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns ``s + window + 1``, int32 ``[b, 1, s]``."""
        return window_end(positions, self.window)[:, None, :]


@policy
class StreamingLLM(IntervalPolicy):
    """Attention sinks, which live to the end of the document, and a window for all other keys.

    A piece that a context edge cuts off counts as a document, as everywhere.

    Attributes:
      num_sinks: tokens at the start of each document, 0 or more.
      window: tokens, 0 or more.

    Raises:
      ValueError: a number is negative.

    Source: arXiv:2309.17453.
    """

    method: ClassVar[str] = "streaming_llm"
    num_sinks: int
    window: int

    def __post_init__(self):
        check_count("num_sinks", self.num_sinks, 0)
        check_count("window", self.window, 0)

    @property
    def setting(self) -> dict[str, int | float]:
        """Sinks and window."""
        return {"sinks": self.num_sinks, "window": self.window}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns int32 ``[b, 1, s]``."""
        return jnp.where(positions < cut(self.num_sinks), NO_END, window_end(positions, self.window))[:, None, :]


RANDOM_DRAWS = 2**24
"""Different samples of ``RandomKeys``: float32 holds them exactly."""


@policy
class RandomKeys(IntervalPolicy):
    """A random fraction of the keys of each head lives to the end of the document, the others as in ``SlidingWindow``.

    It shows the worth of keys that nobody chose. The first token of a document is kept.

    Attributes:
      fraction: of the keys, 0 to 1.
      window: tokens, 0 or more.
      seed: of the samples, which depend on the position and the head, not on the layer.

    Raises:
      ValueError: a number is out of range.
    """

    method: ClassVar[str] = "random"
    by_head: ClassVar[bool] = True
    fraction: float
    window: int = 0
    seed: int = 0

    def __post_init__(self):
        check_count("window", self.window, 0)
        check_seed(self.seed)
        if not 0 <= self.fraction <= 1:  # also when it is nan
            raise ValueError(f"fraction={self.fraction}: it must be between 0 and 1.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Fraction, window and seed."""
        return {"fraction": self.fraction, "window": self.window, "seed": self.seed}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns int32 ``[b, k, s]``."""
        is_kept = self.samples(positions, num_kv_heads).astype(jnp.float32) < self.fraction * RANDOM_DRAWS
        positions = positions[:, None, :]
        return jnp.where(is_kept | (positions == 0), NO_END, window_end(positions, self.window))

    def samples(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Samples int32 ``[b, k, s]``, 0 or more; a key is kept where it is below ``fraction * RANDOM_DRAWS``."""
        head = jnp.arange(num_kv_heads, dtype=jnp.uint32)[:, None]
        samples = _hash(positions[:, None, :].astype(jnp.uint32) ^ _hash(head ^ _hash(jnp.uint32(self.seed))))
        return (samples >> 8).astype(jnp.int32)


def _hash(x: jax.Array) -> jax.Array:
    """Scrambles uint32, one to one: a function of the number alone, on every mesh.

    Source: "lowbias32", https://nullprogram.com/blog/2018/07/31/.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
