"""Checks of what the kernel supports, and its launch."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu.kernel import kernel
from pallas_kernels.decode_attention.pallas_tpu.tiers import STATE_SIZE, bytes_of_tier, depth_of, tiers_in_flight
from pallas_kernels.decode_attention.storage import Format, Storage
from pallas_kernels.manual_axes import vary_alike, varying_axes
from pallas_kernels.tpu_lanes import LANES, VMEM_LIMIT

PLATFORMS: Sequence[str] = ("tpu",)
READS: Sequence[Format] = ("packed",)

_ROWS = {"bfloat16": 16, "float32": 8}
"""Rows of a tile in memory, by dtype: the query heads of a KV head are padded to as many."""


def check(storage: Storage) -> None:
    """Raises NotImplementedError with the reason why a buffer cannot be served."""
    h, u = storage.head_dim, storage.block_size
    if storage.dtype.name not in _ROWS:
        raise NotImplementedError(f"{storage.dtype.name} is not a dtype of its kernel; bfloat16 and float32 are")
    if 2 * h != LANES and h % LANES:
        raise NotImplementedError(f"head dim {h} is neither {LANES // 2} nor a multiple of {LANES}")
    if u % LANES:
        raise NotImplementedError(f"blocks of {u} slots are no multiple of {LANES}")
    if 3 * bytes_of_tier(storage) > VMEM_LIMIT:
        raise NotImplementedError(f"blocks of {u} slots of {storage.shape[2]} heads do not fit into vector memory")


def attend(
    query: jax.Array,
    storage: Storage,
    key_end: jax.Array,
    length: jax.Array,
    position: jax.Array,
    layer: jax.Array,
    scale: float,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the slots: see ``backend.Backend``.

    ``interpret`` True runs the kernel in Pallas' interpreter on any platform, slowly: for tests. A
    ``pltpu.InterpretParams`` also emulates the copies and semaphores of a TPU.
    """
    b, k, g, h = query.shape
    (pairs,), u = storage.arrays, storage.block_size
    # Both as bfloat16 or both as float32.
    dtype = pairs.dtype if query.dtype == pairs.dtype else jnp.dtype(jnp.float32)
    rows = -(-g // _ROWS[dtype.name]) * _ROWS[dtype.name]
    columns = max(h, LANES)
    padded = jnp.pad(query.astype(dtype), ((0, 0), (0, 0), (0, rows - g), (0, columns - h)))
    # Copies are not checked for bounds, so numbers are cut to them here.
    layer = jnp.clip(layer, 0, pairs.shape[0] - 1)
    length = jnp.clip(jax.lax.dynamic_index_in_dim(length, layer, 0, keepdims=False), 0, storage.capacity)
    num_blocks = jax.lax.div(length + u - 1, u)
    numbers = [layer.reshape(1), num_blocks.reshape(-1), jnp.max(num_blocks, axis=1), position]
    arguments = vary_alike([*numbers, padded, pairs, key_end])
    varying = jax.sharding.ManualAxisType(varying=varying_axes(arguments))
    parts = 1 if b % 2 else 2  # some chips have two cores, which divide the first axis of the grid

    def of_sequence(width):
        return pl.BlockSpec((None, k, rows, width), lambda part, i, *_: (part * (b // parts) + i, 0, 0, 0))

    ring, depth = tiers_in_flight(storage), depth_of(k)
    slots = b * k * storage.capacity // 2  # how many are occupied is known at run time alone
    out, lse = pl.pallas_call(
        functools.partial(kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=(parts, b // parts),
            in_specs=[of_sequence(columns), *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
            out_specs=[of_sequence(columns), of_sequence(LANES)],
            scratch_shapes=[
                pltpu.VMEM((ring, depth, k, u, 2 * h), pairs.dtype),
                pltpu.VMEM((ring, depth, k, u), jnp.int32),
                pltpu.SemaphoreType.DMA((ring,)),
                pltpu.SMEM((STATE_SIZE,), jnp.int32),
                pltpu.VMEM((k, rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, k, rows, width), jnp.float32, manual_axis_type=varying)
            for width in (columns, LANES)
        ],
        compiler_params=pltpu.CompilerParams(
            # A sequence finds its first tiers on their way, sent for by the one before.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * slots * rows * columns,
            transcendentals=slots * rows,
            bytes_accessed=slots * (2 * h * pairs.dtype.itemsize + 4),
        ),
        interpret=interpret,
        name="decode_attention",
    )(*arguments)
    return out[:, :, :g, columns - h :], lse[:, :, :g, 0]
