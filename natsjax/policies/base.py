"""What a policy is, and the numbers that it is made of."""

import dataclasses
import math
import operator
import typing
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.model.inputs import Inputs
from pallas_kernels.nats_attention import NO_END

LARGEST = 2**30
"""Tokens: a larger number is the same, and twice it is still within int32 (almost)."""


@typing.dataclass_transform(frozen_default=True)
def policy(cls):
    """Class decorator: a frozen dataclass, and a tree whose leaves are its fields."""
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
    """A number as a program gets it."""
    if name == "seed" and isinstance(value, int | np.integer):
        return np.uint32(value)
    return cut(value)


def cut(number: typing.Any) -> typing.Any:
    """A number of tokens that int32 sums can be made with; what is traced has been cut already."""
    return min(int(number), LARGEST) if isinstance(number, int | np.integer) else number


def check_count(name: str, value: int, smallest: int) -> None:
    """Refuses what is no whole number, or too small.

    Raises:
      ValueError: it is.
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
    """Refuses what is no seed.

    Raises:
      ValueError: it is no whole number from 0 to 2**32 - 1.
    """
    check_count("seed", seed, 0)
    if seed >= 2**32:
        raise ValueError(f"seed={seed}: it must be less than 2**32.")


def check_finite(name: str, value: float) -> None:
    """Refuses NaN and infinities.

    Raises:
      ValueError: it is one.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: a finite number was expected.")


def window_end(positions: jax.Array, window: int | jax.Array) -> jax.Array:
    """The first position that a window of a key does not reach: ``s + window + 1``, ``NO_END`` beyond int32.

    Args:
      positions: int32, any shape.
      window: tokens, 0 or more.
    """
    window = cut(window)
    return jnp.where(window >= NO_END - 1 - positions, NO_END, positions + window + 1)


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

    def choice(self, inputs: Inputs, config: Config) -> RoleSampling:
        """How the model is to choose on this batch.

        Args:
          inputs: the batch, ``[b, s]``.
          config: of the run.
        """
        ...
