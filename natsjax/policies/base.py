"""The interface of a policy, and checks of the numbers that it is made of."""

import dataclasses
import math
import operator
import typing
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config, ModelConfig
from natsjax.model.attention import RoleSampling
from pallas_kernels.nats_attention import NO_END

LARGEST = 2**30
"""Tokens: a larger number is the same, and twice it is still within int32 (almost)."""


@typing.dataclass_transform(frozen_default=True)
def policy(cls):
    """Makes a class a frozen dataclass, and a tree whose leaves are its fields."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(x):
        return [_leaf(name, getattr(x, name)) for name in names], None

    def unflatten(_, values):
        result = object.__new__(cls)  # traced numbers are not checked again
        for name, value in zip(names, values, strict=True):
            object.__setattr__(result, name, value)
        return result

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def _leaf(name: str, value: typing.Any) -> typing.Any:
    """Returns a number as a program gets it."""
    if name == "seed" and isinstance(value, int | np.integer):
        return np.uint32(value)
    return cut(value)


def cut(number: typing.Any) -> typing.Any:
    """Cuts a number of tokens so that int32 sums hold it; a traced one has been cut already."""
    return min(int(number), LARGEST) if isinstance(number, int | np.integer) else number


def check_count(name: str, value: int, smallest: int) -> None:
    """Checks a number of tokens or keys.

    Raises:
      ValueError: it is no whole number, or too small.
    """
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: a whole number was expected.") from None
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: a whole number was expected.")
    if value < smallest:
        raise ValueError(f"{name}={value}: it must be {smallest} or more.")


def check_seed(seed: int) -> None:
    """Checks a seed.

    Raises:
      ValueError: it is no whole number from 0 to 2**32 - 1.
    """
    check_count("seed", seed, 0)
    if seed >= 2**32:
        raise ValueError(f"seed={seed}: it must be less than 2**32.")


def check_finite(name: str, value: float) -> None:
    """Checks a float.

    Raises:
      ValueError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: a finite number was expected.")


def window_end(positions: jax.Array, window: int | jax.Array) -> jax.Array:
    """Returns the first position that the window of a key does not reach: ``s + window + 1``, ``NO_END`` beyond int32.

    Args:
      positions: int32, any shape.
      window: tokens, 0 or more.
    """
    window = cut(window)
    return jnp.where(window >= NO_END - 1 - positions, NO_END, positions + window + 1)


class Policy(Protocol):
    """Decides how long each key can be read."""

    method: ClassVar[str]
    """Name in reports."""
    needs_roles: ClassVar[bool] = False
    """True where the model must have a scorer."""
    needs_selective: ClassVar[bool] = False
    """True where the model must have "selective" layers."""
    by_head: ClassVar[bool] = False
    """True where the KV heads of a layer may keep different keys."""
    observes_attention: ClassVar[bool] = False
    """True where the buffer adds up the attention that each key receives."""
    joins_heads: ClassVar[bool] = False
    """True where all KV heads of a layer keep the same keys, by the attention that all of them pay."""

    @property
    def setting(self) -> dict[str, int | float]:
        """Its numbers, for a report."""
        ...


def unsuited(policy: Policy | type[Policy], model: ModelConfig) -> str | None:
    """Returns why a model's layers cannot follow a policy, a clause without a period; None where they can."""
    if policy.needs_roles and not model.has_roles:
        kind = "selective" if model.has_masks else "dense"
        return f"it reads roles, and a model with {kind} attention has none"
    if policy.needs_selective and not model.has_masks:
        return 'it reads the masks of "selective" layers, and the model has none'
    if policy.by_head and model.has_masks:
        return 'its heads keep different keys, and those of "selective" layers the same ones'
    if policy.observes_attention and model.has_masks:
        return 'it observes attention, and "selective" layers observe their masks instead'
    if policy.joins_heads and "sliding" in model.layer_types and len(set(model.head_windows)) > 1:
        return 'its heads keep the same keys, and those of "sliding" layers have windows of their own'
    return None


class StaticPolicy(Policy, Protocol):
    """A policy that can be a mask."""

    def choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Returns the rule by which roles, or ends of keys, are chosen.

        Args:
          positions: int32 ``[b, s]``, distance to the start of the document.
          config: of the run.
        """
        ...


class DecodingPolicy(Policy, Protocol):
    """A policy that the KV buffer follows. The defaults are those of one that fixes lifetimes when a key is written."""

    observes_last: ClassVar[bool] = False
    """True where the attention of a chunk's queries takes the place of what keys had received before; where a chunk has
    one query that counts (``observed`` = 1 of a prompt, each generated token), the last query's alone is known."""
    every_token: ClassVar[bool] = True
    """False where keys are evicted once, after the prompt, and not while tokens are generated."""

    def chunk_choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Returns the rule for the tokens of a chunk; arguments as in ``StaticPolicy.choice``."""
        ...

    def most_live(self, length: int, num_kv_heads: int) -> int | None:
        """Returns the most keys of a head that are live at once in ``length`` tokens; None: not known in advance."""
        return None

    @property
    def eviction(self) -> "Eviction | None":
        """The rule by which it evicts keys of its own accord, down to ``most_of_a_head``; None: it fixes lifetimes."""
        return None

    def most_of_a_head(self, num_kv_heads: int) -> int:
        """Returns the most keys that ``eviction`` leaves any head of a layer; ``NO_END``: no limit."""
        return NO_END

    def limited_layers(self, model: ModelConfig) -> tuple[bool, ...]:
        """Marks the layers that ``eviction`` holds for, first layer first; other layers keep all keys."""
        return (True,) * model.num_layers

    @property
    def observed(self) -> int:
        """Queries at the end of the prompt whose attention counts; ``NO_END``: all."""
        return NO_END

    def after_prompt(self) -> "DecodingPolicy":
        """Returns the policy for generated tokens."""
        return self


class Eviction:
    """Rule for which live keys go first where a head may keep no more than so many.

    Axis letters: ``b`` batch, ``k`` KV head, ``c`` slot, ``h`` head dim.
    """

    reads_keys: ClassVar[bool] = False
    """True where ``scores`` gets ``weights`` in place of the attention that keys have received."""

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns numbers that follow from the keys themselves, float32 ``[b, k, c]``; only where ``reads_keys``.

        Args:
          keys: ``[b, k, c, h]`` in the buffer's dtype, with the rotary phase of their own position.
          is_live: bool ``[b, k, c]``; what other slots hold, and what they get, means nothing.
        """
        raise NotImplementedError

    def head_budgets(self, scores: tuple[jax.Array, jax.Array], is_live: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns how many keys each head keeps, int32, ``[b, k]`` or a scalar; by default ``limit``.

        It runs inside ``shard_map``, each device with its own heads. While tokens are generated, it is called for rules
        that read keys or observe attention, and others keep ``limit``.

        Args:
          scores: result of ``scores``, ``[b, k, c]`` each.
          is_live: bool ``[b, k, c]``.
          limit: int32 scalar, the most that any head may keep, whatever is returned.
        """
        return limit

    def scores(
        self,
        key_position: jax.Array,
        key_end: jax.Array,
        attention_sum: jax.Array | None,
        query_position: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns two arrays to sort keys by, the first before the second; the smallest goes first, +∞ is kept.

        Args:
          key_position: int32 ``[b, k, c]``, index of each key in its sequence; slots that are not live may hold
            anything here and below.
          key_end: int32 ``[b, k, c]``, the first query that cannot read the key; a live one's is beyond
            ``query_position``.
          attention_sum: float32 ``[b, k, c]``, the attention, or the masks, that each key has received, or its
            ``weights``; None where there are neither.
          query_position: int32 ``[b, 1, 1]``, index of the next query.

        Returns:
          Two arrays ``[b, k, c]``, of floats or integers.
        """
        raise NotImplementedError
