"""Long-lived keys side by side: what makes a block of keys worth skipping.

GLOBAL keys are scattered, so that nearly every block of neighboring keys has one and none can be skipped. Here the
keys that live long are gathered, in index order, into a dense *run* in front of the sequence; the short-lived ones stay
where they are, and the slots that were gathered are dead there. A kernel sees one longer sequence
``[run | keys in place]`` whose keys have a ``key_position`` of their own beside ``key_end``; nothing is of size L².

The run has a static capacity. Keys that do not fit stay in place, alive: blocks around them are computed as before,
nothing is dropped. The transpose takes a gradient by slot back to the keys.

Axis letters: ``b`` batch, ``k`` KV head, ``s`` key, ``c`` slot of the rearranged keys (run first).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.roles import NEVER, NO_END
from pallas_kernels.nats_attention.tiling import Tiling


class Layout(NamedTuple):
    """A rearrangement of keys: the key of each slot, and the slot of each key.

    Attributes:
      source: int32 ``[b, k, capacity]``, the key in each slot of the run; ``s`` (out of range) in an empty one.
      slot: int32 ``[b, k, s]``, the slot in ``[run | keys in place]`` that holds each key.
    """

    source: jax.Array
    slot: jax.Array

    @property
    def capacity(self) -> int:
        """Slots of the run."""
        return self.source.shape[-1]


def lifetime_class(key_position: jax.Array, key_end: jax.Array, thresholds: Sequence[int]) -> jax.Array:
    """Counts the ascending ``thresholds`` that each key outlives (queries): int32 ``[b, k, s]``; 0 stays in place."""
    # A difference of two int32 may be beyond int32; as uint32 it is what it should be.
    lifetime = jnp.where(key_end > key_position, (key_end - key_position).astype(jnp.uint32), 0)
    longest = np.iinfo(np.uint32).max
    outlived = lifetime[..., None] > jnp.asarray([min(x, longest) for x in thresholds], jnp.uint32)
    return jnp.sum(outlived, axis=-1, dtype=jnp.int32)


def arrange(key_position: jax.Array, key_end: jax.Array, *, thresholds: Sequence[int], capacity: int) -> Layout:
    """Chooses the keys of the run: those that outlive the first threshold, by lifetime class and then by index.

    A threshold should be above the window and above a block of keys: below, neighbors in place are alive together.
    With one threshold the run is in index order. More thresholds keep keys of similar lifetimes together, which pays
    when GLOBAL keys are rare and LOCAL ones live long.

    Args:
      key_position, key_end: int32 ``[b, k, s]``.
      thresholds: lifetimes in queries, ascending, at least one.
      capacity: slots of the run; the first keys get them.

    Returns:
      The ``Layout``.
    """
    classes = lifetime_class(key_position, key_end, thresholds)
    length = classes.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    rank, taken = jnp.full_like(classes, capacity), jnp.zeros_like(classes[..., :1])
    for one_class in range(len(thresholds), 0, -1):  # the longest-lived come first
        member = classes == one_class
        count = jnp.cumsum(member, axis=-1, dtype=jnp.int32)
        rank = jnp.where(member, taken + count - 1, rank)
        taken += count[..., -1:]
    batch = [
        jnp.expand_dims(jnp.arange(n), (*range(axis), *range(axis + 1, 3))) for axis, n in enumerate(classes.shape[:2])
    ]
    source = jnp.full((*classes.shape[:2], capacity), length, jnp.int32)
    source = source.at[(*batch, rank)].set(jnp.broadcast_to(index, rank.shape), mode="drop")
    return Layout(source, jnp.where(rank < capacity, rank, capacity + index))


def arrange_for(intervals: Intervals, tiling: Tiling) -> tuple[Layout | None, Intervals]:
    """Returns the rearrangement of a tiling (None: none), and the intervals by slot."""
    if not tiling.thresholds:
        return None, intervals
    length = intervals.key_end.shape[-1]
    # Whole blocks: otherwise the keys in place would not begin at one.
    blocks = math.ceil(tiling.capacity * length / tiling.key_block)
    layout = arrange(
        intervals.key_position,
        intervals.key_end,
        thresholds=tiling.thresholds,
        capacity=blocks * tiling.key_block,
    )
    return layout, Intervals(intervals.query_position, *gather_intervals(layout, *intervals[1:]))


def gather(layout: Layout, x: jax.Array) -> jax.Array:
    """Rearranges ``x [b, k, s, …]`` by slot: ``[b, k, capacity + s, …]``; empty slots of the run are 0."""
    source = layout.source.reshape(*layout.source.shape, *[1] * (x.ndim - 3))
    run = jnp.take_along_axis(x, source, axis=2, mode="fill", fill_value=0)
    return jnp.concatenate([run, x], axis=2)


def gather_intervals(layout: Layout, key_position: jax.Array, key_end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rearranges ``(key_position, key_end)`` by slot, int32 ``[b, k, capacity + s]``; empty and vacated slots are dead.

    Dead slots of the run stand at ``NO_END``, behind everything; in place a vacated slot keeps its position. Both end
    at ``NEVER``: an end of 0 would be read by queries before it.
    """
    position = jnp.take_along_axis(key_position, layout.source, axis=2, mode="fill", fill_value=NO_END)
    end = jnp.take_along_axis(key_end, layout.source, axis=2, mode="fill", fill_value=NEVER)
    in_place = jnp.where(layout.slot < layout.capacity, NEVER, key_end)
    return jnp.concatenate([position, key_position], axis=2), jnp.concatenate([end, in_place], axis=2)


def scatter_back(layout: Layout, y: jax.Array) -> jax.Array:
    """Transposes ``gather``: ``y [b, k, capacity + s, …]`` by slot → ``[b, k, s, …]`` by key.

    A key has one living slot, and what ``y`` holds for dead slots is 0; so the scatter-add is a gather by ``slot``.
    """
    slot = layout.slot.reshape(*layout.slot.shape, *[1] * (y.ndim - 3))
    return jnp.take_along_axis(y, slot, axis=2)
