"""One way to start every kernel: a grid over blocks, and for each a stream of other blocks from a list.

The blocks that a grid step owns are ordinary ones. Those that it walks through stay in HBM and are copied one by one
into two buffers in turn: the next one is on its way while a tile is computed. The number of steps is read from the list
at run time, so that a dead tile costs nothing, not even an empty grid step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual_axes import vary_alike, varying_axes
from pallas_kernels.nats_attention.pallas_tpu.lists import NUM_SEGMENTS
from pallas_kernels.tpu_lanes import VMEM_LIMIT


class Blocks(NamedTuple):
    """An array that is cut along an axis of its own: ``[b, k, block, row, column]``."""

    array: jax.Array | jax.ShapeDtypeStruct

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one block."""
        return self.array.shape[3:]

    @property
    def number(self) -> int:
        """Number of blocks."""
        return self.array.shape[2]

    def spec(self, memory_space=pltpu.VMEM) -> pl.BlockSpec:
        """Returns the spec with which a grid step sees its own block."""
        return pl.BlockSpec((None, None, None, *self.shape), lambda b, k, i: (b, k, i, 0, 0), memory_space=memory_space)

    def at(self, ref, b, k, block):
        """Returns one block of a ref to the whole."""
        return ref.at[b, k, block]


class Tokens(NamedTuple):
    """An array of query heads that is cut along the tokens: ``[b, k, g, t, h]``."""

    array: jax.Array | jax.ShapeDtypeStruct
    block: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one block."""
        return self.array.shape[2], self.block, self.array.shape[4]

    @property
    def number(self) -> int:
        """Number of blocks."""
        return self.array.shape[3] // self.block

    def spec(self) -> pl.BlockSpec:
        """Returns the spec with which a grid step sees its own block."""
        return pl.BlockSpec((None, None, *self.shape), lambda b, k, i: (b, k, 0, i, 0))

    def at(self, ref, b, k, block):
        """Returns one block of a ref to the whole."""
        return ref.at[b, k, :, pl.ds(pl.multiple_of(block * self.block, self.block), self.block)]


class Stream:
    """The blocks of a list, in order, each copied during the computation on the one before.

    ``cuts`` define the blocks of the ``sources``, refs in HBM; ``buffers`` are refs ``[2, …]`` in vector memory.
    """

    def __init__(self, blocks, cuts: Sequence[Blocks | Tokens], sources, buffers, semaphores):
        self._blocks, self._semaphores = blocks, semaphores
        self._cuts, self._sources, self._buffers = cuts, sources, buffers
        self._head = pl.program_id(0), pl.program_id(1)  # inside a loop the interpreter does not know them
        self._start_where(self._end(NUM_SEGMENTS - 1) > 0, 0)

    def _end(self, segment: int) -> jax.Array:
        return self._blocks[0, segment]

    def _copies(self, position):
        slot, block = position & 1, self._blocks[0, NUM_SEGMENTS + position]
        return [
            pltpu.make_async_copy(cut.at(source, *self._head, block), buffer.at[slot], self._semaphores.at[slot, n])
            for n, (cut, source, buffer) in enumerate(zip(self._cuts, self._sources, self._buffers, strict=True))
        ]

    def _start_where(self, condition, position) -> None:
        @pl.when(condition)
        def _start():
            for copy in self._copies(position):
                copy.start()

    def walk(self, segment: int, tile: Callable[..., None]) -> None:
        """Calls ``tile(*refs)`` for each block of a segment; segments are walked in order, none is left out."""

        def step(position, carry):
            # The other buffers have been read: by the step before, in program order.
            self._start_where(position + 1 < self._end(NUM_SEGMENTS - 1), position + 1)
            for copy in self._copies(position):
                copy.wait()
            tile(*(buffer.at[position & 1] for buffer in self._buffers))
            return carry

        jax.lax.fori_loop(self._end(segment - 1) if segment else 0, self._end(segment), step, 0)


def launch(
    kernel: Callable[..., None],
    lists: jax.Array,
    *,
    resident: Sequence[Blocks | Tokens],
    streamed: Sequence[Blocks | Tokens],
    outs: Sequence[Blocks | Tokens],
    scratch: Sequence[tuple[int, int]],
    flops_a_tile: int,
    exps_a_tile: int,
    name: str,
    interpret: Any,
) -> list[jax.Array]:
    """Runs ``kernel(stream, resident refs, out refs, scratch refs)`` for every list.

    Args:
      kernel: what a grid step does; refs are to one block.
      lists: int32 ``[b, k, block, 1, n]`` from ``lists.block_lists``.
      resident: of these a grid step sees its own block.
      streamed: of these it sees one listed block after the other.
      outs: shapes and dtypes of what is written, block by block.
      scratch: shapes of float32 accumulators.
      flops_a_tile, exps_a_tile: for the compiler's schedule, which assumes that half of all tiles are computed: how
        many really are is known at run time alone.
      name: of the kernel in traces and profiles.
      interpret: as in ``TpuTiling``.

    Returns:
      The outputs, whole.
    """
    b, k, blocks = lists.shape[:3]
    num_resident, num_streamed, num_outs = len(resident), len(streamed), len(outs)

    def body(list_ref, *refs):
        own, refs = refs[:num_resident], refs[num_resident:]
        sources, refs = refs[:num_streamed], refs[num_streamed:]
        written, refs = refs[:num_outs], refs[num_outs:]
        buffers, semaphores, accumulators = refs[:num_streamed], refs[num_streamed], refs[num_streamed + 1 :]
        kernel(Stream(list_ref, streamed, sources, buffers, semaphores), own, written, accumulators)

    tiles = b * k * blocks * streamed[0].number // 2
    copied = sum(x.array.size * x.array.dtype.itemsize for x in [*resident, *outs])
    copied += tiles * sum(math.prod(x.shape) * x.array.dtype.itemsize for x in streamed)
    inputs = [lists, *(x.array for x in [*resident, *streamed])]
    varying = jax.sharding.ManualAxisType(varying=varying_axes(inputs))
    return pl.pallas_call(
        body,
        grid=(b, k, blocks),
        in_specs=[
            Blocks(lists).spec(pltpu.SMEM),
            *(x.spec() for x in resident),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in streamed),
        ],
        out_specs=[x.spec() for x in outs],
        out_shape=[jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, manual_axis_type=varying) for x in outs],
        scratch_shapes=[
            *(pltpu.VMEM((2, *x.shape), x.array.dtype) for x in streamed),
            pltpu.SemaphoreType.DMA((2, num_streamed)),
            *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=tiles * flops_a_tile, transcendentals=tiles * exps_a_tile, bytes_accessed=copied
        ),
        interpret=interpret,
        name=name,
    )(*vary_alike(inputs))
