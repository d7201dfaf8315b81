"""Policies that look at indices alone: full attention, windows, sinks, random keys."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.model.inputs import Inputs
from natsjax.policies.base import check_count, check_seed, cut, policy, window_end
from pallas_kernels.nats_attention import NO_END


class IntervalPolicy:
    """Fixes who reads a key from its position in the document alone."""

    method: ClassVar[str]

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """The first position of the document that cannot read each key.

        Every query reads at least its own key: ``key_end > positions``.

        Args:
          positions: int32 ``[b, s]``, distance to the start of the document.
          num_kv_heads: k.

        Returns:
          int32 ``[b, 1, s]`` or ``[b, k, s]``, ``NO_END`` for a key that every later query reads.
        """
        raise NotImplementedError

    def choice(self, inputs: Inputs, config: Config) -> RoleSampling:
        """``key_end`` within the documents of the batch."""
        positions = inputs.positions
        end = self.key_end(positions, config.model.num_kv_heads)
        start = jnp.arange(positions.shape[-1], dtype=jnp.int32) - positions
        start = start[:, None, :]
        end = jnp.where(end >= NO_END - start, NO_END, end + start)
        return RoleSampling(key_end=jnp.minimum(end, inputs.document_end[:, None, :]))


@policy
class FullAttention(IntervalPolicy):
    """Every key lives to the end of its document."""

    method: ClassVar[str] = "full"

    @property
    def setting(self) -> dict[str, int | float]:
        """No number."""
        return {}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """``NO_END``, int32 ``[b, 1, s]``."""
        return jnp.full_like(positions, NO_END)[:, None, :]


@policy
class SlidingWindow(IntervalPolicy):
    """A key lives for its own query and the ``window`` queries behind it.

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
        """``s + window + 1``, int32 ``[b, 1, s]``."""
        return window_end(positions, self.window)[:, None, :]


@policy
class StreamingLLM(IntervalPolicy):
    """The first tokens of each document ("attention sinks") live to its end, the others as in ``SlidingWindow``.

    A piece that a context edge cuts off counts as a document, as everywhere.

    Attributes:
      num_sinks: tokens, 0 or more.
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
        """int32 ``[b, 1, s]``."""
        return jnp.where(positions < cut(self.num_sinks), NO_END, window_end(positions, self.window))[:, None, :]


RANDOM_DRAWS = 2**24
"""Different draws of ``RandomKeys``: float32 holds them exactly."""


@policy
class RandomKeys(IntervalPolicy):
    """A random share of the keys of each head lives to the end of the document, the others as in ``SlidingWindow``.

    What keeping keys is worth that nobody chose. The first token of a document is kept.

    Attributes:
      share: of the keys, 0 to 1.
      window: tokens, 0 or more.
      seed: of the draws, which depend on the position and the head, not on the layer.

    Raises:
      ValueError: a number is out of range.
    """

    method: ClassVar[str] = "random"
    share: float
    window: int = 0
    seed: int = 0

    def __post_init__(self):
        check_count("window", self.window, 0)
        check_seed(self.seed)
        if not 0 <= self.share <= 1:  # also when it is nan
            raise ValueError(f"share={self.share}: it must lie between 0 and 1.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Share, window and seed."""
        return {"share": self.share, "window": self.window, "seed": self.seed}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """int32 ``[b, k, s]``."""
        is_kept = self.draws(positions, num_kv_heads).astype(jnp.float32) < self.share * RANDOM_DRAWS
        positions = positions[:, None, :]
        return jnp.where(is_kept | (positions == 0), NO_END, window_end(positions, self.window))

    def draws(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """A key is kept where its draw is below ``share * RANDOM_DRAWS``: int32 ``[b, k, s]``, 0 or more."""
        head = jnp.arange(num_kv_heads, dtype=jnp.uint32)[:, None]
        draws = _hash(positions[:, None, :].astype(jnp.uint32) ^ _hash(head ^ _hash(jnp.uint32(self.seed))))
        return (draws >> 8).astype(jnp.int32)


def _hash(x: jax.Array) -> jax.Array:
    """Scrambles uint32, one to one: a function of the number alone, on every mesh.

    Source: "lowbias32", https://nullprogram.com/blog/2018/07/31/.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def most_live(policy: IntervalPolicy, length: int, num_kv_heads: int) -> int:
    """The most keys of a head that are live at once in a sequence of ``length`` tokens."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    ends = np.asarray(policy.key_end(positions, num_kv_heads)).reshape(-1, length)
    most = 0
    for end in ends:
        ended = np.bincount(np.minimum(end, length), minlength=length + 1)
        most = max(most, int(np.max(1 + np.arange(length) - np.cumsum(ended)[:length])))
    return most
