"""Backward: the gradients through the visible pairs, and the role sums over visible and over masked-out ones.

Everything is made of ``e[t, s] = ratio * (dp - delta)`` with ``ratio = min(exp(x - lse), 1)`` and ``dp = dout · value``
(docs/method.md 3): for visible pairs it is the gradient of the logit, for the others what seeing the key would have
been worth. A sum of e over *all* rows of a key needs no dp of its own, for dp is linear in the value:

    sum_t e[t, s] = value[s] · (sum_t ratio dout[t]) - sum_t ratio delta[t]

where the first bracket is, over the visible pairs, the gradient of the value. So only tiles in which a lifetime may end
look at single e.

Tiles are transposed, ``[p, s, m]`` with the keys before the rows: that is the orientation in which neither the products
nor the sums over rows have to be transposed on a CPU.

Axis letters as in ``lanes``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.blocks import (
    Tiles,
    clear_empty_rows,
    first_query,
    masked_out_tiles,
    most,
    visible_tiles,
)
from pallas_kernels.nats_attention.roles import RoleColumns, RoleSums
from pallas_kernels.nats_attention.xla.heuristics import XlaTiling
from pallas_kernels.nats_attention.xla.lanes import Lanes, add, dot, take


class _Block(NamedTuple):
    """Rows of one query block: ``query``, ``dout [p, m, h]``, ``lse``, ``delta``, ``at [p, m]``.

    ``at`` is each row's index, once for every head of the group. The mask is made of it, row by row, outside the loop
    over keys: were one mask of ``[p, s, t]`` spread over the group in there, XLA's CPU loops would find each row's
    query by arithmetic on indices, and compute the exponentials around it one at a time.
    """

    query: jax.Array
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array
    at: jax.Array


def _rows_in_groups(rows: Rows, lanes: Lanes) -> Rows:
    """Converts ``[b, k, g, t, …]`` to ``[n, t, a, g, …]``; padded rows contribute nothing."""
    fill = (0, 0, jnp.inf, 0)
    return Rows(*(lanes.rows_in_groups(x, value) for x, value in zip(rows, fill, strict=True)))


def _block_of_rows(rows: Rows, at: jax.Array, i, lanes: Lanes) -> _Block:
    # Block by block: a copy of all rows with some of them cleared would be as large as the query.
    query, dout, lse, delta = clear_empty_rows(Rows(*(lanes.rows_of(x, i) for x in rows)))
    return _Block(query, dout, lse, delta, jnp.tile(at, lse.shape[-1] // at.shape[-1]))


class _Weighted(NamedTuple):
    """By key: ``dout``, ``sum_t ratio · dout [a · j, s, h]``, and ``delta``, ``sum_t ratio · delta [a · j, s]``."""

    dout: jax.Array
    delta: jax.Array

    @classmethod
    def zeros(cls, value: jax.Array) -> "_Weighted":
        """Returns the sums of keys before any tile; ``value [a · j, s, h]``."""
        return cls(jnp.zeros(value.shape, jnp.float32), jnp.zeros(value.shape[:2], jnp.float32))

    def add(self, j: jax.Array, own: _Block, ratio: jax.Array) -> "_Weighted":
        """Adds a tile of each lane. As a column of ``dout``, ``delta`` would cost a CPU's product a quarter."""
        update = dot("psm,pmh->psh", ratio.astype(own.dout.dtype), own.dout)
        return _Weighted(add(self.dout, j, update), add(self.delta, j, dot("psm,pm->ps", ratio, own.delta)))

    def sum_of_e(self, value: jax.Array) -> jax.Array:
        """Returns ``sum_t e`` of each key, ``[a · j, s]``."""
        return jnp.sum(value.astype(jnp.float32) * self.dout, -1) - self.delta


def _ratio(own: _Block, keys: jax.Array, scale: float, counts: jax.Array | None = None) -> jax.Array:
    """Computes ``min(exp(x - lse), 1)``, float32 ``[p, s, m]``, 0 for pairs that do not count (None: all do).

    Visible pairs have x <= lse, masked-out ones may exceed it.
    """
    exponent = jnp.minimum(scale * dot("psh,pmh->psm", keys, own.query) - own.lse[:, None], 0)
    return jnp.exp(exponent if counts is None else jnp.where(counts, exponent, -jnp.inf))


def _e(own: _Block, ratio: jax.Array, values: jax.Array) -> jax.Array:
    return ratio * (dot("psh,pmh->psm", values, own.dout) - own.delta[:, None])


def _sum_group(e: jax.Array, query_block: int) -> jax.Array:
    """Sums ``[p, s, m]`` to ``[p, s, query_block]``, behind a barrier: else XLA sums again for every use.

    Head by head: XLA would pull a product in front of a ``sum`` into it, which takes twice as long on a CPU.
    """
    heads = [e[:, :, start : start + query_block] for start in range(0, e.shape[2], query_block)]
    return jax.lax.optimization_barrier(functools.reduce(jnp.add, heads))


def visible_pass(
    rows: Rows,
    key,
    value,
    intervals: Intervals,
    columns: RoleColumns | None,
    scale: float,
    windows: tuple[int, ...],
    tiling: XlaTiling,
) -> tuple[jax.Array, jax.Array, jax.Array, RoleSums | None]:
    """Computes gradients of query, key and value, and the role sums over visible pairs: see ``Backend``."""
    b, k, _, t, h = rows.query.shape
    length = key.shape[2]
    lanes = Lanes.of(tiling, b * k, t)
    intervals = lanes.pad_intervals(intervals)
    tiles = visible_tiles(intervals, lanes.query_block, lanes.key_block)
    if columns is not None:
        columns = RoleColumns(*(lanes.pad_keys(x, 0) for x in columns))
        settled = jnp.maximum(intervals.key_position + max(windows), columns.next_global)  # after it, only the full sum
        far = most(settled, lanes.key_block) < first_query(intervals.query_position, lanes.query_block)
        tiles = Tiles(tiles.alive, tiles.plain & far)
        columns = RoleColumns(*(lanes.keys_in_groups(x) for x in columns))
    lists = lanes.lists(tiles)
    key, value = (lanes.keys_in_groups(x) for x in (key, value))

    def group(arrays):
        rows, key, value, intervals, columns, lists = arrays

        def query_blocks(by_key, i):
            at = lanes.positions_of(intervals.query_position, i)
            own = _block_of_rows(rows, at, i, lanes)

            def step(masked, position, carry):
                dquery, row, dkey, weighted, sums = carry
                j = lists.order[i, position]
                tile = _Tile.of(at, intervals, j)
                keys = take(key, j)
                ratio = _ratio(own, keys, scale, tile._replace(at=own.at[:, None]).visible if masked else None)
                e = _e(own, ratio, take(value, j))
                if masked and columns is not None:
                    column = _columns_of_blocks(columns, j)
                    tile_sums, tile_row = _visible_sums(_sum_group(e, lanes.query_block), tile, column, windows)
                    sums = [add(x, j, y) for x, y in zip(sums, tile_sums, strict=True)]
                    row += tile_row
                ds = e.astype(key.dtype)  # of the logits before the scale, which is applied once at the end
                dquery += dot("psh,psm->phm", keys, ds)
                dkey = add(dkey, j, dot("psm,pmh->psh", ds, own.query))
                return dquery, row, dkey, weighted.add(j, own, ratio), sums

            dquery = jnp.zeros((own.query.shape[0], h, own.query.shape[1]), jnp.float32)
            carry = (*vary_like((dquery, jnp.zeros(at.shape, jnp.float32)), arrays), *by_key)
            carry = jax.lax.fori_loop(0, lists.num_plain[i], lambda *a: step(False, *a), carry)
            carry = jax.lax.fori_loop(lists.num_plain[i], lists.num_alive[i], lambda *a: step(True, *a), carry)
            dquery, row, *by_key = carry
            return tuple(by_key), (lanes.by_query(scale * jnp.swapaxes(dquery, 1, 2)), lanes.by_query(row))

        start = (
            jnp.zeros(key.shape, jnp.float32),
            _Weighted.zeros(value),
            [] if columns is None else [jnp.zeros(key.shape[:2], jnp.float32)] * (2 + len(windows)),
        )
        steps = jnp.arange(lists.num_alive.shape[0], dtype=jnp.int32)
        (dkey, weighted, sums), by_row = jax.lax.scan(query_blocks, vary_like(start, arrays), steps)
        if columns is not None:
            sums = [weighted.sum_of_e(value), *sums]
        return scale * dkey, weighted.dout, sums, *by_row

    arrays = (_rows_in_groups(rows, lanes), key, value, lanes.intervals_in_groups(intervals), columns, lists)
    dkey, dvalue, sums, dquery, row = jax.lax.map(group, arrays)
    dquery = lanes.by_head(dquery, (b, k), t)
    dkey, dvalue = (lanes.keys_by_head(x, (b, k, length)) for x in (dkey, dvalue))
    if columns is None:
        return dquery, dkey, dvalue, None
    every, at_own, local, *sliding = (lanes.keys_by_head(x, (b, k, length)) for x in sums)
    row = lanes.by_head(row, (b, k), t)[:, :, 0]
    return dquery, dkey, dvalue, RoleSums(every, at_own, local, tuple(sliding), jnp.zeros_like(every), row)


class _Tile(NamedTuple):
    """The integers of a tile: ``at [p, 1, t]``, ``begin`` and ``end [p, s, 1]``."""

    at: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, at: jax.Array, intervals: Intervals, j: jax.Array) -> "_Tile":
        """Returns the tile of each lane: queries at ``at [p, t]``, key blocks ``j [p]``."""
        begin, end = (take(x, j)[:, :, None] for x in intervals[1:])
        return cls(at[:, None], begin, end)

    @property
    def visible(self) -> jax.Array:
        """Bool ``[p, s, t]``."""
        return (self.begin <= self.at) & (self.at < self.end)


def _columns_of_blocks(columns: RoleColumns, j: jax.Array) -> RoleColumns:
    """Returns the properties of the keys of each lane: ``[p, s, 1]``."""
    return RoleColumns(*(take(x, j)[:, :, None] for x in columns))


def _total(e: jax.Array, where: jax.Array) -> jax.Array:
    """Sums e where a condition holds, to ``[p, s]``, as a product with ones: XLA's own sums are slow on a CPU."""
    return dot("pst,t->ps", jnp.where(where, e, 0), jnp.ones(e.shape[2], e.dtype))


def _visible_sums(
    e: jax.Array, tile: _Tile, column: RoleColumns, windows: tuple[int, ...]
) -> tuple[list[jax.Array], jax.Array]:
    """Computes the sums of a tile; ``e [p, s, t]``, 0 for hidden pairs.

    Returns:
      ``([own, local, sliding for each window] of [p, s], row [p, t])``.
    """
    at, begin = tile.at, tile.begin
    by_key = [
        _total(e, at == begin),
        _total(e, (begin < at) & (at <= column.next_global)),
        *(_total(e, at <= begin + window) for window in windows),
    ]
    of_local = jnp.where(column.is_local & (begin < at), e, 0)
    return by_key, dot("ps,pst->pt", jnp.ones(e.shape[:2], e.dtype), of_local)  # in this order nothing is transposed


def masked_out_pass(
    rows: Rows,
    key,
    value,
    intervals: Intervals,
    weight,
    columns: RoleColumns,
    scale: float,
    windows: tuple[int, ...],
    tiling: XlaTiling,
) -> RoleSums:
    """Computes the role sums over masked-out pairs: see ``Backend``."""
    b, k, length, _ = key.shape
    lanes = Lanes.of(tiling, b * k, rows.query.shape[3])
    intervals = lanes.pad_intervals(intervals)
    is_global = columns.is_global
    columns = RoleColumns(*(lanes.pad_keys(x, 0) for x in columns))
    lists = lanes.lists(masked_out_tiles(intervals, columns, windows, lanes.query_block, lanes.key_block))
    # e is linear in dout and delta, so a row that stands for many is a row with a longer gradient.
    dout = (rows.dout * weight[:, None]).astype(rows.dout.dtype)
    rows = _rows_in_groups(rows._replace(dout=dout, delta=rows.delta * weight), lanes)
    key, value = (lanes.keys_in_groups(x) for x in (key, value))

    def group(arrays):
        rows, key, value, intervals, columns, lists = arrays

        def query_blocks(carry, i):
            at = lanes.positions_of(intervals.query_position, i)
            own = _block_of_rows(rows, at, i, lanes)

            def step(masked, position, carry):
                weighted, sums = carry
                j = lists.order[i, position]
                tile, column = _Tile.of(at, intervals, j), _columns_of_blocks(columns, j)
                row = own.at[:, None]
                hidden = (tile.begin <= row) & (row < column.reach) & (row >= column.key_end)
                ratio = _ratio(own, take(key, j), scale, hidden if masked else None)
                if masked:
                    e = _sum_group(_e(own, ratio, take(value, j)), lanes.query_block)
                    tile_sums = [
                        _total(e, tile.at <= column.next_global),
                        _total(e, column.is_local & (tile.at <= column.second_global)),
                        *(_total(e, tile.at <= tile.begin + window) for window in windows),
                    ]
                    sums = [add(x, j, y) for x, y in zip(sums, tile_sums, strict=True)]
                return weighted.add(j, own, ratio), sums

            carry = jax.lax.fori_loop(0, lists.num_plain[i], lambda *a: step(False, *a), carry)
            carry = jax.lax.fori_loop(lists.num_plain[i], lists.num_alive[i], lambda *a: step(True, *a), carry)
            return carry, None

        start = (_Weighted.zeros(value), [jnp.zeros(key.shape[:2], jnp.float32)] * (2 + len(windows)))
        steps = jnp.arange(lists.num_alive.shape[0], dtype=jnp.int32)
        (weighted, sums), _ = jax.lax.scan(query_blocks, vary_like(start, arrays), steps)
        return [weighted.sum_of_e(value), *sums]

    in_groups = RoleColumns(*(lanes.keys_in_groups(x) for x in columns))
    sums = jax.lax.map(group, (rows, key, value, lanes.intervals_in_groups(intervals), in_groups, lists))
    every, local, past, *sliding = (lanes.keys_by_head(x, (b, k, length)) for x in sums)
    # The plain tiles do not ask who is visible: there that can only be GLOBAL keys, and these have no hidden pair.
    every = jnp.where(is_global, 0, every)
    zeros = jnp.zeros_like(every)
    return RoleSums(every, zeros, local, tuple(sliding), past, zeros)
