"""Warpgroups of the kernels: two compute, one copies tiles ahead of them; layouts, buffers, launch.

Streamed tiles go round a ring of slots in shared memory. The memory warpgroup fills a slot once both compute
warpgroups have consumed what was in it; these wait until it is loaded. Every barrier's completion is observed, also
the last ones: otherwise the next use of the shared memory would begin with a barrier in the wrong phase.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention.pallas_gpu.heuristics import GpuTiling
from pallas_kernels.nats_attention.pallas_gpu.lists import LOG2E

ROWS = 64
"""Rows of a warpgroup's tile: those of one matrix product."""
COMPUTE = 2
"""Compute warpgroups; the one behind them copies."""
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 240, 24  # a thread: 64512 of the 65536 of a multiprocessor

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of a vector with one number for each row of a product's result."""
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The same for each column."""


def vector(ref, layout) -> jax.Array:
    """Loads a vector from shared or global memory, in ``PER_ROW`` or ``PER_COLUMN``."""
    return plgpu.load(ref, layout=layout, optimized=False)


def zeros(shape: Sequence[int], layout, value: float = 0.0) -> jax.Array:
    """Returns float32 in registers, all of it ``value``."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def to_rows(x: jax.Array, columns: int) -> jax.Array:
    """Broadcasts a vector ``PER_ROW`` to a tile whose columns are equal."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def to_columns(x: jax.Array, rows: int) -> jax.Array:
    """Broadcasts a vector ``PER_COLUMN`` to a tile whose rows are equal."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def tiles_in_shared_memory(*shape: int, dtype) -> Any:
    """Returns the type of a buffer of 16-bit tiles ``[…, rows, columns]``, in the layout of copies and products."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def left_operand(tiling: GpuTiling, columns: int, dtype) -> Any:
    """Returns the type of the buffer for left operands that cannot stay in registers (None: they can)."""
    return tiles_in_shared_memory(COMPUTE, ROWS, columns, dtype=dtype) if tiling.interpret else None


def copy_in(sources: Sequence[Any], targets: Sequence[Any], loaded) -> None:
    """Copies from global into shared memory and waits; ``loaded`` is a barrier of as many arrivals."""
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, loaded)
    plgpu.barrier_wait(loaded)


def copy_out(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Copies (source, target) from shared to global memory, sources that this warpgroup has just written."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def product(left, right, shape: tuple[int, int]) -> jax.Array:
    """Computes ``left @ right`` of two tiles in shared memory, float32 ``shape``."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(acc, left: jax.Array, right, buffer, warpgroup) -> None:
    """Starts ``acc += left @ right``, with ``left`` computed in registers; done after ``wgmma_wait(0)``."""
    if buffer is None:
        plgpu.wgmma(acc, left, right)
        return
    # The one buffer can serve products that follow each other: the interpreter, for which it is, finishes each at once.
    buffer = buffer.at[warpgroup]
    buffer[...] = left
    plgpu.commit_smem()
    plgpu.wgmma(acc, buffer, right)


def clipped_ratio(logits: jax.Array, lse: jax.Array, scale: float) -> jax.Array:
    """Computes ``min(exp(x - lse), 1)``, ``lse`` in base 2; only masked-out pairs can have x > lse."""
    return jnp.exp2(lax.min(logits * (scale * LOG2E) - lse, jnp.zeros_like(lse)))


def slot_of(item: jax.Array, slots: int) -> jax.Array:
    """Returns the place of an item's tiles in the ring."""
    return lax.rem(item, jnp.int32(slots))


def feed(
    num_items: jax.Array, slots: int, consumed, find: Callable[[jax.Array], Any], load: Callable[[Any, jax.Array], None]
) -> None:
    """Runs the memory warpgroup's loop: ``load(find(item), slot)`` for every item, when its slot is free.

    Items are in a list in global memory: ``find`` reads one while the slot is still in use.
    """

    @pl.loop(0, num_items)
    def _load(item):
        slot, source = slot_of(item, slots), find(item)

        @pl.when(item >= slots)
        def _free():
            plgpu.barrier_wait(consumed.at[slot])

        load(source, slot)

    @pl.loop(lax.max(num_items - slots, jnp.int32(0)), num_items)
    def _drain(item):
        plgpu.barrier_wait(consumed.at[slot_of(item, slots)])


def by_role(compute: Callable[[jax.Array], None], memory: Callable[[], None]) -> None:
    """Runs ``compute(warpgroup)`` on the compute warpgroups and ``memory()`` on the one behind them."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTE)
    def _memory():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        memory()


def plain_then_masked(step: Callable, num_plain: jax.Array, num_items: jax.Array, carry):
    """Runs ``carry = step(masked, item, carry)`` for every item; the first ``num_plain`` need no mask."""
    carry = lax.fori_loop(0, num_plain, functools.partial(step, False), carry)
    return lax.fori_loop(num_plain, num_items, functools.partial(step, True), carry)


def launch(
    body: Callable,
    inputs: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    shared: Any,
    grid: tuple[int, int],
    interpret: bool,
    name: str,
) -> Sequence[jax.Array]:
    """Runs ``body(inputs, *outputs, shared=shared)`` on every (block, head) of the grid."""
    results = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types={"shared": shared},
        grid=grid,
        grid_names=("block", "head"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name=f"nats_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(inputs)
    # The kernel forgets along which axes of a mesh its inputs vary (inside ``jax.shard_map``).
    return vary_like(list(results), inputs)
