"""The numbers of a policy: what they may be, and how they get into compiled programs.

A program counts in int32. A window, a number of sinks or of keys from 2**30 on is without an end for every sequence
there can be, and is cut there on its way to the devices; the policy keeps the number it was given, for reports.
"""

import dataclasses
import math
import operator
import typing

import jax
import jax.numpy as jnp
import numpy as np

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
