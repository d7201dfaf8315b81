"""How many slots to allocate: a few sizes, close to what is needed, and layers that need alike together.

Everything here runs on the host, between compiled programs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_PER_OCTAVE = 8
"""Sizes between a number and its double; each is compiled for once."""

_VECTOR = 16
"""Slots, the smallest part of a block that sizes are multiples of: a CPU's product takes as many at once."""

_HEADROOM = 1.125
"""What a buffer is enlarged to beyond the need: with the step to the next size at most 1.27 times what is needed."""

_WORTH_A_GROUP = 1.1
"""Layers are divided into more groups only where fewer would allocate this many times as much."""


def round_up(need: int, block: int) -> int:
    """The smallest size that holds ``need`` slots: a multiple of ``block``, eight sizes from each to its double.

    Example:
      >>> round_up(1100, 128)
      1152
    """
    blocks = max(1, -(-need // block))
    step = 1
    while blocks > 2 * _PER_OCTAVE * step:
        step *= 2
    return -(-blocks // step) * step * block


def slots_for(need: int, block: int, most: int, *, any_block: bool) -> int:
    """Slots of a head that needs ``need``, and never more than the sequence would fill with full attention.

    Where storage comes in blocks of any size, the block follows from the length: with sequences shorter than eight
    blocks sizes are multiples of a part of it, at least 16, and full attention over ``most`` tokens takes as many
    slots, rounded up to 16 beyond two blocks. Else everything takes whole blocks.

    Args:
      need: slots.
      block: slots that are read together.
      most: tokens that the sequence will have, at most.
      any_block: whether a block of the storage may have any number of slots (``storage.py``: "transposed").

    Example:
      >>> [slots_for(need, 128, 73, any_block=True) for need in (10, 40, 73)]
      [16, 48, 73]
    """
    need = min(need, most)
    if not any_block:
        return round_up(need, block)
    part = block
    while part % 2 == 0 and part > max(_VECTOR, most // _PER_OCTAVE):
        part //= 2
    if most <= 2 * block:
        full = most
    else:
        full = round_up(most, block) if part == block else -(-most // _VECTOR) * _VECTOR
    return min(round_up(need, part), max(1, full))


def with_headroom(need: int) -> int:
    """Slots of a buffer that will need more than ``need`` soon, before they are rounded up."""
    return int(np.ceil(_HEADROOM * need))


def enlarged(need: int, block: int) -> int:
    """The size for a buffer that will need more than ``need`` slots soon."""
    return round_up(with_headroom(need), block)


def storage_block(capacity: int, block: int) -> int:
    """Slots of a block of the storage, which divide the capacity: ``block``, or up to twice as many."""
    if capacity % block == 0:
        return 2 * block if capacity % (2 * block) == 0 else block
    blocks = -(-capacity // (2 * block))
    while capacity % blocks:
        blocks += 1
    return capacity // blocks


def layer_groups(need: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """Numbers of neighbouring layers that get one capacity, so that a layer that keeps little need not take much.

    Args:
      need: slots, of each layer's fullest head.
      most: groups, at most.

    Returns:
      Layers of each group, in order: as few groups as come within 10 % of what ``most`` groups would allocate.
    """
    slots = np.asarray(need)
    layers = len(slots)
    # cost[n][end]: slots of the first `end` layers in n groups; the last group begins at start[n][end].
    cost = np.full((most + 1, layers + 1), np.inf)
    start = np.zeros((most + 1, layers + 1), np.int64)
    cost[0, 0] = 0
    for n in range(1, most + 1):
        for end in range(1, layers + 1):
            fullest = np.maximum.accumulate(slots[:end][::-1])[::-1]
            totals = cost[n - 1, :end] + fullest * (end - np.arange(end))
            start[n, end] = int(np.argmin(totals))
            cost[n, end] = totals[start[n, end]]
    best = cost[1:, layers].min()
    groups = next(n for n in range(1, most + 1) if cost[n, layers] <= _WORTH_A_GROUP * best)
    sizes, end = [], layers
    for n in range(groups, 0, -1):
        sizes.append(int(end - start[n, end]))
        end = int(start[n, end])
    return sizes[::-1]


class Layout(NamedTuple):
    """Layers and slots of each group."""

    layers: tuple[int, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, need: np.ndarray, most: int, size: Callable[[int], int]) -> "Layout":
        """For these slots by layer: ``layer_groups``, each with the size of what its fullest layer needs."""
        layers = layer_groups(need, most)
        parts = np.split(np.asarray(need), np.cumsum(layers)[:-1])
        return cls(tuple(layers), tuple(size(int(np.max(part))) for part in parts))

    @property
    def by_layer(self) -> np.ndarray:
        """Slots of a head in each layer."""
        return np.repeat(self.slots, self.layers)

    @property
    def total(self) -> int:
        """Slots of a head over all layers."""
        return int(self.by_layer.sum())
