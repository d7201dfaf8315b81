"""How many slots to allocate: a few sizes, close to what is needed, and layers that need alike together.

Everything here runs on the host, between compiled programs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PER_OCTAVE = 8
"""Sizes between a number and its double; each is compiled for once."""

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


def enlarged(need: int, block: int) -> int:
    """The size for a buffer that will need more than ``need`` slots soon."""
    return round_up(int(np.ceil(_HEADROOM * need)), block)


def storage_block(capacity: int, block: int) -> int:
    """Slots of a block of the storage: ``block``, or twice as many where that divides the capacity."""
    return 2 * block if capacity % (2 * block) == 0 else block


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
    def of(cls, need: np.ndarray, most: int, block: int) -> "Layout":
        """For these slots by layer: ``layer_groups``, each with a size that holds its fullest layer."""
        layers = layer_groups(need, most)
        parts = np.split(np.asarray(need), np.cumsum(layers)[:-1])
        return cls(tuple(layers), tuple(round_up(int(np.max(part)), block) for part in parts))

    @property
    def by_layer(self) -> np.ndarray:
        """Slots of a head in each layer."""
        return np.repeat(self.slots, self.layers)

    @property
    def total(self) -> int:
        """Slots of a head over all layers."""
        return int(self.by_layer.sum())
