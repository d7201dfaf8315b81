"""Lanes of a TPU's vector registers: columns, rows, and sums over the lanes; for the kernels of both packages."""

import jax
import jax.numpy as jnp

LANES = 128
"""Numbers side by side in a register. Blocks are a multiple of it wide, whichever way they are stored."""
VMEM_LIMIT = 48 << 20
"""Bytes of vector memory that a kernel may take: three quarters of the 64 MiB of the smallest chip that is served."""


def column(row: jax.Array) -> jax.Array:
    """Turns ``[1, n]`` into ``[n, 128]``, the same in every lane; Mosaic refuses to reshape a row to a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def as_row(column: jax.Array) -> jax.Array:
    """Turns ``[n, 128]``, the same in every lane, into ``[1, n]``."""
    return column.T[:1]


def spread(column: jax.Array, columns: int) -> jax.Array:
    """Turns ``[n, 128]``, the same in every lane, into ``[n, columns]``."""
    return repeat_lanes(column, columns // LANES)


def repeat_lanes(x: jax.Array, times: int) -> jax.Array:
    """Concatenates ``times`` copies of ``x`` along its last axis."""
    return x if times == 1 else jnp.concatenate([x] * times, axis=1)


def fold_lanes(x: jax.Array, columns: int = LANES) -> jax.Array:
    """Sums ``[n, i · columns]`` over i, to ``[n, columns]``. Whole registers are added: no number changes its lane."""
    return sum(x[:, i : i + columns] for i in range(columns, x.shape[1], columns)) + x[:, :columns]


def sum_lanes_as_row(x: jax.Array) -> jax.Array:
    """Sums ``[n, 128]`` over the lanes, to a row ``[1, n]``."""
    return jnp.sum(x.T, axis=0, keepdims=True)
