"""Capacities of a KV buffer, making a buffer, and moving its slots to another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.decode.buffer import AXES, KVBuffer, LayerGroup, by_shard
from natsjax.model import sharding
from pallas_kernels.decode_attention import Format, Storage

_PER_OCTAVE = 8
"""Sizes between a number and its double; each is compiled for once."""

_VECTOR = 16
"""Slots, the smallest part of a block that sizes are multiples of: a CPU's product takes as many at once."""

_HEADROOM = 1.125
"""Factor by which a buffer grows beyond the need: with the step to the next size, at most 1.27."""

_WORTH_A_GROUP = 1.1
"""Layers are divided into more groups only where fewer would allocate this many times as much."""


def round_up(need: int, block: int) -> int:
    """Rounds up to the smallest size with ``need`` slots: a multiple of ``block``, eight sizes from each to its double.

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
    """Returns the slots of a head that needs ``need``, never more than the sequence would fill with full attention.

    Where storage comes in blocks of any size, the block follows from the length: with sequences shorter than eight
    blocks sizes are multiples of a part of it, at least 16, and full attention over ``most`` tokens takes as many
    slots, rounded up to 16 beyond two blocks. Else everything takes whole blocks.

    Args:
      need: slots.
      block: slots that are read together.
      most: tokens that the sequence will have, at most.
      any_block: True where a block of the storage may have any number of slots (``storage.py``: "transposed").

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
    """Returns the slots of a buffer that will need more than ``need`` soon, not yet rounded up."""
    return int(np.ceil(_HEADROOM * need))


def grown(need: int, block: int) -> int:
    """Returns the size of a buffer that will need more than ``need`` slots soon."""
    return round_up(with_headroom(need), block)


def storage_block(capacity: int, block: int) -> int:
    """Returns the slots of a block of the storage, which divide the capacity: ``block``, or up to twice as many."""
    if capacity % block == 0:
        return 2 * block if capacity % (2 * block) == 0 else block
    blocks = -(-capacity // (2 * block))
    while capacity % blocks:
        blocks += 1
    return capacity // blocks


def layer_groups(need: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """Divides layers into neighbors that get one capacity, so that a layer that keeps little need not take much.

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
        """Makes the layout for these slots by layer: ``layer_groups``, each as large as its fullest layer needs."""
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


def empty(
    num_layers: Sequence[int],
    capacity: Sequence[int],
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    format: Format,
    block: int,
    adds_up: bool = False,
    shifts_keys: bool = False,
) -> KVBuffer:
    """Makes a buffer without keys.

    Args:
      num_layers, capacity: layers and slots of each group; slots are a multiple of ``block``.
      batch: sequences.
      num_kv_heads: k.
      head_dim: h.
      dtype: of keys and values.
      format: their layout in memory (``decode_attention.storage_format``).
      block: slots that are read together, at least.
      adds_up: with ``attention_sum``.
      shifts_keys: with ``key_before``.
    """

    def group(layers: int, slots: int) -> LayerGroup:
        shape = (layers, batch, num_kv_heads, slots)
        slots_of_a_block = storage_block(slots, block)
        group = LayerGroup(
            Storage.empty((*shape, head_dim), dtype, format, slots_of_a_block),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape[:3], jnp.int32),
            jnp.zeros(shape, jnp.float32) if adds_up else None,
            jnp.zeros((*shape[:3], head_dim), dtype) if shifts_keys else None,
        )
        return jax.tree.map(lambda x: sharding.reshard(x, *AXES[x.ndim]), group)

    return tuple(group(layers, slots) for layers, slots in zip(num_layers, capacity, strict=True))


@by_shard
def _move(source: LayerGroup, target: LayerGroup, first: jax.Array, start: jax.Array, count: jax.Array) -> LayerGroup:
    """Copies ``count`` layers of ``source``, from ``start``, into ``target`` from ``first`` on; others are cut."""

    def fit(x, axis):
        missing = target.capacity - x.shape[axis]
        widths = [(0, max(missing, 0)) if n == axis else (0, 0) for n in range(x.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(x, widths), 0, target.capacity, axis=axis)

    def step(n, target):
        def put(x, y, by_slot=True):
            if x is None:
                return None
            y = jax.lax.dynamic_index_in_dim(y, start + n, 0, keepdims=False)
            y = fit(y, 2) if by_slot else y
            return jax.lax.dynamic_update_index_in_dim(x, y, first + n, 0)

        keys, values = (fit(x, 2) for x in source.storage.layer(start + n))
        return LayerGroup(
            target.storage.set_layer(first + n, keys, values),
            put(target.key_position, source.key_position),
            put(target.key_end, source.key_end),
            put(target.length, source.length, by_slot=False),
            put(target.attention_sum, source.attention_sum),
            put(target.key_before, source.key_before, by_slot=False),
        )

    return jax.lax.fori_loop(0, count, step, target)


def regroup(buffer: KVBuffer, target: KVBuffer) -> KVBuffer:
    """Moves all slots to other groups, of other capacities.

    Args:
      buffer: ``length`` nowhere above the capacity that its layer gets (``compact`` it first).
      target: an empty one, of as many layers.
    """
    result, first = [], 0
    for group in target:
        at = 0  # layers before the source
        for source in buffer:
            begin, end = max(first, at), min(first + group.num_layers, at + source.num_layers)
            if begin < end:
                numbers = (jnp.int32(n) for n in (begin - first, begin - at, end - begin))
                group = _move(source, group, *numbers)
            at += source.num_layers
        result.append(group)
        first += group.num_layers
    return tuple(result)


def allocated_slots(buffer: KVBuffer) -> int:
    """Counts the slots of all layers, sequences and heads."""
    return sum(group.key_end.size for group in buffer)


def allocated_bytes(buffer: KVBuffer) -> int:
    """Counts the bytes of keys, values and the numbers beside them, on all devices together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
