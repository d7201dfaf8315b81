"""Copies of the blocks of a buffer, in the order in which they are read, ahead of the computation.

*Tier* t of a sequence is the t-th block of every head that has so many, or, where a device has few heads, the t-th few
blocks: what is computed side by side is to be there together. Each block of a head is one copy, and ``key_end`` of all
heads is another, as that array is stored. Several tiers are copied at once, those of the next sequences
too: a block of 128 slots with head dim 64 is 32 KiB, and a copy takes about a microsecond, in which the memory of these
chips moves a megabyte or two.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.storage import Storage

SIDE_BY_SIDE = 4
"""Blocks that are computed at a time."""
STATE_SIZE = 3

_IN_FLIGHT = 2 << 20
"""Bytes that should be on their way, where it takes no more than ``_MOST_TIERS`` to have them."""
_MOST_TIERS = 16
_NEVER = -(2**31)  # key_end of slots that no position reads


def heads_at_a_time(num_heads: int) -> int:
    """Returns the number of heads that are computed together, a divisor, so that all groups of heads are alike."""
    return max(n for n in range(1, SIDE_BY_SIDE + 1) if num_heads % n == 0)


def depth_of(num_heads: int) -> int:
    """Returns the blocks of a head in a tier; of many heads one is enough memory."""
    return SIDE_BY_SIDE // heads_at_a_time(num_heads) if num_heads < 2 * SIDE_BY_SIDE else 1


def bytes_of_tier(storage: Storage) -> int:
    """Returns the bytes of a tier with a block of every head."""
    _, _, _, k, u, width = storage.arrays[0].shape
    return depth_of(k) * k * u * (width * storage.dtype.itemsize + 4)


def tiers_in_flight(storage: Storage) -> int:
    """Returns the tiers in the ring, a power of two, so that a tier's place is the last bits of its number."""
    tiers = 2
    while tiers < _MOST_TIERS and tiers * bytes_of_tier(storage) < _IN_FLIGHT:
        tiers *= 2
    return tiers


@dataclasses.dataclass(frozen=True)
class Tiers:
    """The tiers of some sequences, one sequence after the other, in a ring of buffers.

    Attributes:
      layer: number of the layer.
      end: the first sequence that is no longer one of these.
      num_blocks, longest: refs: blocks of every head ``[b · k]``, and of the head that has most ``[b]``.
      sources: refs in HBM: keys and values ``[l, j, b, k, u, 2h]``, ``key_end [l, b, k, c]``.
      buffers: refs in vector memory, ``[ring, depth, k, u, 2h]`` and ``[ring, depth, k, u]``.
      semaphores: one a buffer: a tier is read when all of it has come.
      state: ref to ``STATE_SIZE`` numbers: sequence and tier to copy next, how many tiers were read.
    """

    layer: jax.Array
    end: jax.Array
    num_blocks: Any
    longest: Any
    sources: Sequence[Any]
    buffers: Sequence[Any]
    semaphores: Any
    state: Any

    def begin(self, b: jax.Array) -> None:
        """Starts to fill the ring with the tiers of sequence ``b``."""
        self.state[0], self.state[1], self.state[2] = b, 0, 0
        _for(self._ring - 1, self._copy_next)

    def for_each(self, b: jax.Array, visit: Callable[..., None]) -> None:
        """Calls ``visit`` for up to ``SIDE_BY_SIDE`` blocks of the same tier at a time.

        Its arguments are

        * the first of ``heads_at_a_time`` heads,
        * a ref to their keys and values ``[depth, heads, u, 2h]``,
        * ``key_end`` as rows ``[1, u]``, one per block, in the same order.

        At least one of these blocks is occupied. The ``key_end`` of another lets no query read its slots, and its keys
        and values are undefined.
        """
        heads = heads_at_a_time(self._heads)

        def read(t):
            number = self.state[2]
            self.state[2] = number + 1
            # The tier before this one was read, in program order, so its buffers are free.
            self._copy_next((number + self._ring - 1) & (self._ring - 1))
            place = number & (self._ring - 1)
            pairs, ends = self.buffers
            self._each_copy(b, t, place, lambda copy: copy.wait())

            def some(i):
                first = i * heads
                these = [first + n for n in range(heads)]
                is_occupied = [self._has_block(b, head, t * self._depth) for head in these]

                @pl.when(functools.reduce(jnp.logical_or, is_occupied))
                def _visit():
                    rows = [
                        jnp.where(self._has_block(b, head, t * self._depth + n), ends[place, n, pl.ds(head, 1)], _NEVER)
                        for n in range(self._depth)
                        for head in these
                    ]
                    visit(first, pairs.at[place, :, pl.ds(first, heads)], rows)

            _for(self._heads // heads, some)

        _for(self._steps(b), read)

    @property
    def _ring(self) -> int:
        return self.buffers[0].shape[0]

    @property
    def _depth(self) -> int:
        return self.buffers[0].shape[1]

    @property
    def _heads(self) -> int:
        return self.buffers[0].shape[2]

    def _has_block(self, b, head, j):
        return j < self.num_blocks[b * self._heads + head]

    def _steps(self, b):
        tiers = jax.lax.div(self.longest[b] + self._depth - 1, self._depth)
        return jnp.maximum(tiers, 1)  # so that after a sequence comes the next, also where that is empty

    def _copy_next(self, place) -> None:
        b, t = self.state[0], self.state[1]

        @pl.when(b < self.end)
        def _start():
            self._each_copy(b, t, place, lambda copy: copy.start())
            is_last = t + 1 >= self._steps(b)
            self.state[0] = jnp.where(is_last, b + 1, b)
            self.state[1] = jnp.where(is_last, 0, t + 1)

    def _each_copy(self, b, t, place, do: Callable[..., None]) -> None:
        (pairs, ends), (pairs_buffer, ends_buffer) = self.sources, self.buffers
        semaphore, u = self.semaphores.at[place], pairs_buffer.shape[3]

        def blocks(n):
            j = t * self._depth + n

            @pl.when(j < self.longest[b])
            def _ends():
                slots = pl.ds(pl.multiple_of(j * u, u), u)
                do(pltpu.make_async_copy(ends.at[self.layer, b, :, slots], ends_buffer.at[place, n], semaphore))

            def block(head):
                @pl.when(self._has_block(b, head, j))
                def _block():
                    source = pairs.at[self.layer, j, b, head]
                    do(pltpu.make_async_copy(source, pairs_buffer.at[place, n, head], semaphore))

            _for(self._heads, block)

        _for(self._depth, blocks)


def _for(number, do: Callable[[jax.Array], None]) -> None:
    def step(i, carry):
        do(i)
        return carry

    jax.lax.fori_loop(0, number, step, 0)
