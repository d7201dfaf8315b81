"""What decides how long a key lives: one small frozen dataclass per policy.

Each says how the model is to choose (``choice``), and what a report calls it (``method``, ``setting``). These are the
static ones: they fix who reads a key when it is written, either by the model's roles or from indices alone. (H2O and
SnapKV decide from the attention that they observe; they live in the decode loop.)

To add one: give it ``method`` and ``setting``, and let ``choice`` return a ``RoleChoice`` whose numbers are arrays, so
that a compiled forward pass serves every setting. Every query sees at least its own key: ``key_end[s] >= s + 1``.

Axis letters: ``b`` batch, ``s`` key index.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from natsjax import token_types
from natsjax.config import NatsConfig
from natsjax.model import Inputs, RoleChoice


class Policy(Protocol):
    """Decides how long each key can be read."""

    method: ClassVar[str]
    """What reports call it (``natsjax.report.METHOD_STYLES`` has the known ones)."""

    @property
    def setting(self) -> dict[str, int | float]:
        """Its numbers, for a report."""
        ...

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """How the model is to choose on this batch.

        Args:
          inputs: the batch, ``[b, s]``.
          nats: of the run.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FullAttention:
    """Every key lives to the end of its document."""

    method: ClassVar[str] = "full"

    @property
    def setting(self) -> dict[str, int | float]:
        """No number."""
        return {}

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """``key_end = document_end``, int32 ``[b, 1, s]``."""
        return RoleChoice(key_end=inputs.document_end[:, None, :])


@dataclasses.dataclass(frozen=True)
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

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """The dial's bias, float32 ``[3]``."""
        return RoleChoice(bias=token_types.dial_bias(self.dial, nats.dial))


@dataclasses.dataclass(frozen=True)
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

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """The noise key; whoever measures several batches folds the batch's number into it."""
        return RoleChoice(noise_key=jax.random.key(self.seed))


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """A key lives for its own query and the ``window`` queries behind it.

    Attributes:
      window: tokens, 0 or more.

    Raises:
      ValueError: the window is negative.
    """

    method: ClassVar[str] = "sliding_window"
    window: int

    def __post_init__(self):
        _check_not_negative("window", self.window)

    @property
    def setting(self) -> dict[str, int | float]:
        """The window."""
        return {"window": self.window}

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """``key_end = s + window + 1`` within the document, int32 ``[b, 1, s]``."""
        return RoleChoice(key_end=_sliding_end(inputs, self.window)[:, None, :])


@dataclasses.dataclass(frozen=True)
class StreamingLLM:
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
        _check_not_negative("num_sinks", self.num_sinks)
        _check_not_negative("window", self.window)

    @property
    def setting(self) -> dict[str, int | float]:
        """Sinks and window."""
        return {"sinks": self.num_sinks, "window": self.window}

    def choice(self, inputs: Inputs, nats: NatsConfig) -> RoleChoice:
        """int32 ``key_end [b, 1, s]``."""
        is_sink = inputs.positions < self.num_sinks
        key_end = jnp.where(is_sink, inputs.document_end, _sliding_end(inputs, self.window))
        return RoleChoice(key_end=key_end[:, None, :])


def _sliding_end(inputs: Inputs, window: int) -> jax.Array:
    """int32 ``[b, s]``, cut to the document (0 where padded)."""
    index = jnp.arange(inputs.document_end.shape[-1], dtype=jnp.int32)
    return jnp.minimum(index + (window + 1), inputs.document_end)


def _check_not_negative(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}={value}: it must be 0 or more tokens.")
