"""KV buffers as they are allocated: empty ones, what they take, and the move from one to another.

Axis letters as in ``natsjax.kv_buffer``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natsjax import capacity as capacities
from natsjax.kv_buffer import AXES, KVBuffer, LayerGroup, by_shard
from natsjax.model import sharding
from pallas_kernels.decode_attention import Format, Storage


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
    observed: bool = False,
) -> KVBuffer:
    """A buffer without keys.

    Args:
      num_layers, capacity: layers and slots of each group; slots are a multiple of ``block``.
      batch: sequences.
      num_kv_heads: k.
      head_dim: h.
      dtype: of keys and values.
      format: how they lie in memory (``decode_attention.storage_format``).
      block: slots that are read together, at least.
      observed: with ``mass``.
    """

    def group(layers: int, slots: int) -> LayerGroup:
        shape = (layers, batch, num_kv_heads, slots)
        storage_block = capacities.storage_block(slots, block)
        group = LayerGroup(
            Storage.empty((*shape, head_dim), dtype, format, storage_block),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape[:3], jnp.int32),
            jnp.zeros(shape, jnp.float32) if observed else None,
        )
        return jax.tree.map(lambda x: sharding.reshard(x, *AXES[x.ndim]), group)

    return tuple(group(layers, slots) for layers, slots in zip(num_layers, capacity, strict=True))


@by_shard
def _move(source: LayerGroup, target: LayerGroup, first: jax.Array, start: jax.Array, count: jax.Array) -> LayerGroup:
    """``target`` with ``count`` layers of ``source``, from ``start``, put from ``first`` on; slots beyond are cut."""

    def fit(x, axis):
        missing = target.capacity - x.shape[axis]
        widths = [(0, max(missing, 0)) if n == axis else (0, 0) for n in range(x.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(x, widths), 0, target.capacity, axis=axis)

    def step(n, target):
        def put(x, y):
            if x is None:
                return None
            y = jax.lax.dynamic_index_in_dim(y, start + n, 0, keepdims=False)
            y = y if y.ndim == 2 else fit(y, 2)
            return jax.lax.dynamic_update_index_in_dim(x, y, first + n, 0)

        keys, values = (fit(x, 2) for x in source.storage.layer(start + n))
        return LayerGroup(
            target.storage.set_layer(first + n, keys, values),
            put(target.key_position, source.key_position),
            put(target.key_end, source.key_end),
            put(target.length, source.length),
            put(target.mass, source.mass),
        )

    return jax.lax.fori_loop(0, count, step, target)


def regroup(buffer: KVBuffer, target: KVBuffer) -> KVBuffer:
    """All slots in other groups, of other capacities.

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
    """Slots of all layers, sequences and heads."""
    return sum(group.key_end.size for group in buffer)


def allocated_bytes(buffer: KVBuffer) -> int:
    """What keys, values and the numbers beside them take, on all devices together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
