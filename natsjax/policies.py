"""What decides how long a key lives: one small frozen dataclass per policy.

Three kinds. ``IntervalPolicy`` fixes the last reader of a key from indices alone, when the key is written; ``Nats``
lets the model's roles say it. Both are static: ``choice`` turns them into the masks of a whole forward pass, and
decoding writes the same ``key_end`` into its buffer. ``ObservingPolicy`` decides from the attention that keys receive,
in the buffer: nothing is known in advance, and there is no mask.

Every policy is a tree whose leaves are its numbers: one compiled program serves every setting. CONTRIBUTING.md says how
to add one.

Axis letters: ``b`` batch, ``s`` key index, ``k`` KV head, ``c`` slot.
"""

import dataclasses
import typing
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from natsjax import token_types
from natsjax.attention import Inputs, RoleChoice
from natsjax.config import Config
from pallas_kernels.nats_attention import NO_END


class Policy(Protocol):
    """Decides how long each key can be read."""

    method: ClassVar[str]
    """What reports call it (``natsjax.report.METHOD_STYLES`` has the known ones)."""

    @property
    def setting(self) -> dict[str, int | float]:
        """Its numbers, for a report."""
        ...


class StaticPolicy(Policy, Protocol):
    """A policy that can be a mask."""

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """How the model is to choose on this batch.

        Args:
          inputs: the batch, ``[b, s]``.
          config: of the run.
        """
        ...


@typing.dataclass_transform(frozen_default=True)
def policy(cls):
    """Class decorator: a frozen dataclass, and a tree whose leaves are its fields."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def unflatten(_, values):
        result = object.__new__(cls)  # traced numbers are not checked again
        for name, value in zip(names, values, strict=True):
            object.__setattr__(result, name, value)
        return result

    jax.tree_util.register_pytree_node(cls, lambda x: ([getattr(x, name) for name in names], None), unflatten)
    return cls


def _check_at_least(name: str, value: float, smallest: float) -> None:
    if value < smallest:
        raise ValueError(f"{name}={value}: it must be {smallest:g} or more.")


# --- static: from indices ---


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

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """``key_end`` within the documents of the batch."""
        positions = inputs.positions
        end = self.key_end(positions, config.model.num_kv_heads)
        start = jnp.arange(positions.shape[-1], dtype=jnp.int32) - positions
        end = jnp.where(end == NO_END, NO_END, end + start[:, None, :])
        return RoleChoice(key_end=jnp.minimum(end, inputs.document_end[:, None, :]))


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
        _check_at_least("window", self.window, 0)

    @property
    def setting(self) -> dict[str, int | float]:
        """The window."""
        return {"window": self.window}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """``s + window + 1``, int32 ``[b, 1, s]``."""
        return (positions + (self.window + 1))[:, None, :]


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
        _check_at_least("num_sinks", self.num_sinks, 0)
        _check_at_least("window", self.window, 0)

    @property
    def setting(self) -> dict[str, int | float]:
        """Sinks and window."""
        return {"sinks": self.num_sinks, "window": self.window}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """int32 ``[b, 1, s]``."""
        return jnp.where(positions < self.num_sinks, NO_END, positions + (self.window + 1))[:, None, :]


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
        _check_at_least("window", self.window, 0)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: it must lie between 0 and 1.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Share, window and seed."""
        return {"share": self.share, "window": self.window, "seed": self.seed}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """int32 ``[b, k, s]``."""
        head = jnp.arange(num_kv_heads, dtype=jnp.uint32)[:, None]
        draws = _hash(positions[:, None, :].astype(jnp.uint32) ^ _hash(head ^ _hash(jnp.uint32(self.seed))))
        is_kept = (draws >> 8).astype(jnp.float32) < self.share * 2.0**24  # 24 bits are exact in float32
        positions = positions[:, None, :]
        return jnp.where(is_kept | (positions == 0), NO_END, positions + (self.window + 1))


def _hash(x: jax.Array) -> jax.Array:
    """Scrambles uint32, one to one: a function of the number alone, on every mesh.

    Source: "lowbias32", https://nullprogram.com/blog/2018/07/31/.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


# --- static: from the model's roles ---


@policy
class Nats:
    """The model's own roles, by the largest logit.

    Attributes:
      dial: added to the logits of the roles that ``nats.dial`` names; above 0 keeps more KV, below less.
    """

    method: ClassVar[str] = "nats"
    dial: float = 0.0

    @property
    def setting(self) -> dict[str, int | float]:
        """The dial."""
        return {"dial": self.dial}

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """The dial's bias, float32 ``[3]``."""
        return RoleChoice(bias=token_types.dial_bias(self.dial, config.nats.dial))


@policy
class SampledNats:
    """The model's own roles drawn as in training, with Gumbel noise: what the price was steered on, never served.

    Attributes:
      seed: of the noise.
    """

    method: ClassVar[str] = "nats_sampled"
    seed: int = 0

    @property
    def setting(self) -> dict[str, int | float]:
        """The seed."""
        return {"seed": self.seed}

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """The noise key; whoever measures several batches folds the batch's number into it."""
        return RoleChoice(noise_key=jax.random.key(self.seed))


# --- from the attention that keys receive ---


class ObservingPolicy:
    """Keeps ``num_keys`` keys of every head, chosen by the attention that they have received.

    Attributes:
      num_keys: the most keys of a head, tokens.
    """

    method: ClassVar[str]
    every_token: ClassVar[bool]
    """Whether it goes on evicting while tokens are generated; else the prompt alone is cut down."""
    num_keys: int

    @property
    def observed(self) -> int:
        """Queries at the end of the prompt, or of a chunk, whose attention counts; ``NO_END``: all."""
        return NO_END

    def order(
        self, key_position: jax.Array, key_end: jax.Array, mass: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``natsjax.kv_buffer.Eviction``."""
        raise NotImplementedError


@policy
class H2O(ObservingPolicy):
    """The newest keys, and of the others those that have received the most attention in all ("heavy hitters").

    Attributes:
      num_keys: of a head, 1 or more.
      num_recent: of them, the newest ones; the paper takes half.

    Raises:
      ValueError: a number is out of range.

    Source: arXiv:2306.14048.
    """

    method: ClassVar[str] = "h2o"
    every_token: ClassVar[bool] = True
    num_keys: int
    num_recent: int

    def __post_init__(self):
        _check_at_least("num_keys", self.num_keys, 1)
        if not 0 <= self.num_recent <= self.num_keys:
            raise ValueError(f"num_recent={self.num_recent}: it must lie between 0 and num_keys={self.num_keys}.")

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return {"keys": self.num_keys, "recent": self.num_recent}

    def order(
        self, key_position: jax.Array, key_end: jax.Array, mass: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """By attention received, then by age."""
        assert mass is not None
        return jnp.where(key_position >= at - self.num_recent, jnp.inf, mass), key_position


@policy
class SnapKV(ObservingPolicy):
    """When the prompt has been read: its last keys, and those that its last queries look at, with their neighbours.

    Attributes:
      num_keys: of a head, more than the observation window.
      observation_window: queries at the end of the prompt.

    Raises:
      ValueError: a number is out of range.

    Source: arXiv:2404.14469.
    """

    method: ClassVar[str] = "snapkv"
    every_token: ClassVar[bool] = False
    _POOL: ClassVar[int] = 7  # neighbouring keys that are kept with one, as in the paper
    num_keys: int
    observation_window: int = 32

    def __post_init__(self):
        _check_at_least("observation_window", self.observation_window, 1)
        _check_at_least("num_keys", self.num_keys, self.observation_window + 1)

    @property
    def setting(self) -> dict[str, int | float]:
        """Both numbers."""
        return {"keys": self.num_keys, "observed": self.observation_window}

    @property
    def observed(self) -> int:
        """The observation window."""
        return self.observation_window

    def order(
        self, key_position: jax.Array, key_end: jax.Array, mass: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """By attention received by the key or a neighbour, then by age; slots are in the order of the keys."""
        assert mass is not None
        window = (1,) * (mass.ndim - 1) + (self._POOL,)
        pooled = jax.lax.reduce_window(mass, -jnp.inf, jax.lax.max, window, (1,) * mass.ndim, "SAME")
        return jnp.where(key_position >= at - self.observation_window, jnp.inf, pooled), key_position


# --- what goes first where a static policy would keep more than there may be ---


@policy
class SoonestEnd:
    """The key whose last reader comes first: SLIDING, LOCAL, GLOBAL; of those alike the oldest, the first one last."""

    def order(
        self, key_position: jax.Array, key_end: jax.Array, mass: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``natsjax.kv_buffer.Eviction``."""
        is_first = key_position == 0
        return jnp.where(is_first, NO_END, key_end), jnp.where(is_first, NO_END, key_position)


@policy
class Oldest:
    """The oldest key but the first of the sequence."""

    def order(
        self, key_position: jax.Array, key_end: jax.Array, mass: jax.Array | None, at: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``natsjax.kv_buffer.Eviction``."""
        return jnp.where(key_position == 0, NO_END, key_position), key_end


EVICTIONS: dict[str, SoonestEnd | Oldest] = {"soonest_end": SoonestEnd(), "oldest": Oldest()}
"""By name, for ``max_kv``."""
