"""Checks of arguments: int32 without wrap-around, floats, a scale that float32 can represent."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32 = np.iinfo(np.int32)
_LEAST, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def as_int32(name: str, array: Any, shape: Sequence[int], outside: int | None = None) -> jax.Array:
    """Checks an array of integers and returns it as int32.

    Args:
      name: of the argument, for messages.
      array: of any integer dtype; NumPy's int64 is looked at before JAX would cut off its upper half.
      shape: that is expected.
      outside: what stands for a number that int32 cannot hold; None: the nearest that it can.

    Raises:
      ValueError: another shape, or no integers.
    """
    if array.shape != tuple(shape):
        raise ValueError(f"{name} has shape {array.shape}; {tuple(shape)} was expected.")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; int32 was expected.")
    if array.dtype == np.int32:
        return array
    given = np.iinfo(array.dtype)
    low, high = max(given.min, _INT32.min), min(given.max, _INT32.max)
    library = np if isinstance(array, np.ndarray) else jnp
    cut = library.clip(array, low, high).astype(np.int32)
    return cut if outside is None else library.where((array < low) | (array > high), np.int32(outside), cut)


def check_floats(**arrays: Any) -> None:
    """Raises ValueError for an array whose dtype is not a real floating-point number."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; a floating-point dtype was expected.")


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for head dim 0: no logit can be made of it."""
    if not head_dim:
        raise ValueError("head dim 0: it must be at least 1.")


def checked_window(given: int) -> int:
    """Checks a window and returns it as an int, tokens.

    Raises:
      ValueError: a negative number, or none.
    """
    try:
        window = operator.index(given)
    except TypeError:  # that of an array which is being traced too
        window = -1
    if window < 0:
        raise ValueError(f"window={given}: it must be 0 or more tokens.")
    return window


def checked_windows(given: int | Sequence[int]) -> tuple[int, ...]:
    """Checks a window, or several, and returns them as a tuple of ints, tokens.

    Raises:
      ValueError: a negative number, none at all, or windows that do not ascend.
    """
    windows = tuple(map(checked_window, given if isinstance(given, Sequence) else [given]))
    if not windows or any(y <= x for x, y in itertools.pairwise(windows)):
        raise ValueError(f"window={given}: one number of tokens or several in ascending order were expected.")
    return windows


def checked_scale(given: float | None, head_dim: int) -> float:
    """Checks the scale of the logits and returns it; None stands for ``head_dim ** -0.5``.

    Raises:
      ValueError: not a number that is positive as float32 (a smaller one would be 0 there), or known only when the
        program runs.
    """
    if given is None:
        return head_dim**-0.5
    try:
        scale = float(given)
    except (TypeError, ValueError):  # an array that is being traced is a TypeError
        scale = math.nan
    if not _LEAST <= scale <= _MOST:
        raise ValueError(f"scale={given}: a positive number was expected.")
    return scale
