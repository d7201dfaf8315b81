"""The next token from logits: greedy, or drawn with a temperature from the likeliest ones.

Draws depend on the seed, the sequence's number and the token's index alone: not on the batch, nor on the mesh.

Axis letters: ``b`` batch, ``v`` vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.errors import UserError
from natsjax.model import sharding

_COLDEST = 1e-30
"""Temperatures below are 0: float32 would have none of their quotients."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Rule by which tokens are drawn.

    Filters apply in this order, each to the tokens that the ones before left; the likeliest always stays.

    Attributes:
      temperature: of the softmax; 0 takes the likeliest token (of several the one with the smallest id).
      top_k: number of the likeliest tokens that may be drawn; 0: all.
      top_p: as many of the likeliest tokens as reach this fraction of the probability, the last one included
        (arXiv:1904.09751).
      min_p: those with at least this fraction of the likeliest one's probability (arXiv:2407.01082).
      seed: of the draws.

    Raises:
      UserError: a number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, value, fits, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more, and finite"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and up to 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", self.seed, 0 <= self.seed < 2**31, "between 0 and 2**31 - 1"),
        ):
            if not fits:
                raise UserError(f"{name} = {value}: it must be {expected}.")

    @property
    def kind(self) -> "Kind":
        """The part that a program is compiled for."""
        is_filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        is_greedy = self.temperature < _COLDEST
        return Kind(is_greedy, is_filtered and not is_greedy)

    @property
    def numbers(self) -> "Numbers":
        """The part that a compiled program takes as arguments."""
        return Numbers(
            jnp.float32(self.temperature),
            jnp.int32(min(self.top_k, 2**31 - 1)),  # beyond any vocabulary
            jnp.float32(self.top_p),
            jnp.float32(self.min_p),
            jnp.int32(self.seed),
        )


def by_row(samplings: Sequence[Sampling]) -> tuple["Kind", "Numbers"]:
    """Returns the kind of program that serves several rules at once, and their numbers, NumPy arrays ``[b]``."""
    kinds = [sampling.kind for sampling in samplings]
    kind = Kind(all(kind.is_greedy for kind in kinds), any(kind.is_filtered for kind in kinds))
    columns = zip(*(sampling.numbers for sampling in samplings), strict=True)
    stacked: list[Any] = [np.stack(column) for column in columns]
    return kind, Numbers(*stacked)


class Kind(NamedTuple):
    """Kind of a program: True where the likeliest token is taken, and where the vocabulary has to be sorted.

    The second one draws as the first one does for numbers that are greedy, and as one without filters for numbers that
    have none.
    """

    is_greedy: bool
    is_filtered: bool


class Numbers(NamedTuple):
    """The fields of ``Sampling``: scalars on device, or ``[b]`` where each sequence has its own."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def sample(
    logits: jax.Array, sequence: jax.Array, index: jax.Array, kind: Kind, numbers: Numbers
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each sequence.

    Args:
      logits: float32 ``[b, v]``.
      sequence: int32 ``[b]``, the number of each sequence.
      index: int32 ``[b]``, of the token that is drawn.
      kind: of the ``Sampling``.
      numbers: of the ``Sampling``, or of each sequence's own.

    Returns:
      int32 ``[b]`` and float32 ``[b]``: the token, and the log-probability that the model gave it (at temperature 1,
      before any filter).
    """

    def on_device(logits, sequence, index, *numbers):
        given = Numbers(*numbers)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if not kind.is_greedy:
            axes: list[Any] = [0 if x.ndim else None for x in given]
            own = Numbers(*axes)
            draw = jax.vmap(lambda x, s, i, n: _draw(x, s, i, kind, n), in_axes=(0, 0, 0, own))
            token = jnp.where(given.temperature < _COLDEST, token, draw(logits, sequence, index, given))
        return token, _logprobs_of(logits, token)

    by_sequence: sharding.Axes = ("batch",)
    axes = (("batch", None), ("batch",), ("batch",), *(by_sequence if jnp.ndim(x) else () for x in numbers))
    return sharding.shard_map(on_device, axes, [("batch",), ("batch",)])(logits, sequence, index, *numbers)


def _draw(logits, sequence, index, kind: Kind, numbers: Numbers) -> jax.Array:
    """Draws one token from logits ``[v]``."""
    key = jax.random.key(numbers.seed)
    key = jax.random.fold_in(jax.random.fold_in(key, sequence), index)
    scaled = (logits - jnp.max(logits)) / jnp.maximum(numbers.temperature, _COLDEST)
    plain = jax.random.categorical(key, scaled).astype(jnp.int32)
    if not kind.is_filtered:
        return plain
    has_filter = (numbers.top_k > 0) | (numbers.top_p < 1) | (numbers.min_p > 0)
    scaled, ids = jax.lax.top_k(scaled, scaled.shape[0])
    rank = jnp.arange(scaled.shape[0])
    kept = (rank == 0) | (numbers.top_k == 0) | (rank < numbers.top_k)
    probability = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
    kept &= (rank == 0) | (jnp.cumsum(probability) - probability < numbers.top_p)
    kept &= scaled - scaled[0] >= jnp.log(numbers.min_p)
    filtered = ids[jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))].astype(jnp.int32)
    return jnp.where(has_filter, filtered, plain)


def logprobs_of(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the log-probability of int32 ``token [b]`` by float32 ``logits [b, v]``, at temperature 1: ``[b]``."""
    by_sequence: sharding.Axes = ("batch",)
    return sharding.shard_map(_logprobs_of, [("batch", None), by_sequence], by_sequence)(logits, token)


def _logprobs_of(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]


class Likeliest(NamedTuple):
    """The likeliest tokens at an index, the likeliest first, ``[…, n]``.

    Attributes:
      tokens: int32.
      logprobs: float32, at temperature 1.
    """

    tokens: jax.Array
    logprobs: jax.Array


def likeliest(logits: jax.Array, count: int) -> Likeliest:
    """Finds the ``count`` likeliest tokens of float32 logits ``[b, v]``."""

    def on_device(logits):
        logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), count)
        return tokens, logprobs

    axes: sharding.Axes = ("batch", None)
    return Likeliest(*sharding.shard_map(on_device, [axes], [axes, axes])(logits))
