"""Blockwise attention in plain JAX for every platform: forward, backward and the gradient of the roles in O(L) memory.

For each block of queries a loop runs over the list of key blocks that some query of the block can read (any head,
any sequence: skipping per head is the fast layout's job) and carries an online softmax; the backward walks the same
way and adds up dK, dV and the five range sums that the role gradient is made of (METHOD.md 3).

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim;
inside, heads lie before the sequence: query ``[b, k, g, t, h]``, key and value ``[b, k, s, h]``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.nats_attention import roles as roles_lib

_MAX_BLOCK = 256  # rows and columns of a tile: what fits a core's cache, and the best of 128/256/512 in KERNELS.md


class _Intervals(NamedTuple):
    """Who reads whom: query t reads key s when ``key_position[s] <= query_position[t] < key_end[s]``."""

    query_position: jax.Array  # int32 [b, t]; -1 reads nothing
    key_position: jax.Array  # int32 [b, k, s]
    key_end: jax.Array  # int32 [b, k, s]


class _RoleColumns(NamedTuple):
    """What the role gradient needs to know of each key, int32 or bool ``[b, k, s]``."""

    reach: jax.Array  # first query that the sums leave out
    next_global: jax.Array
    second_global: jax.Array
    is_local: jax.Array


class _RoleSums(NamedTuple):
    """Sums of e[t, s] over queries t (``row``: over keys s), float32 ``[b, k, s]`` (``row``: ``[b, k, t]``)."""

    all: jax.Array  # t = s … reach - 1
    own: jax.Array  # t = s
    local: jax.Array  # t = s+1 … n(s)
    sliding: jax.Array  # t = s … s + window
    past: jax.Array  # LOCAL keys: t = n(s)+1 … n2(s)
    row: jax.Array  # visible LOCAL keys s < t


def _block(length: int) -> int:
    """The largest block of at most ``_MAX_BLOCK`` that divides the sequence with the least padding."""
    return -(-length // -(-length // _MAX_BLOCK))


def _pad(x: jax.Array, axis: int, block: int, value) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def _slice(x: jax.Array, block_index, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block_index * block, block, axis)


def _add(x: jax.Array, update: jax.Array, block_index, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        x, _slice(x, block_index, block, axis) + update, block_index * block, axis
    )


def _pad_intervals(intervals: _Intervals, bq: int, bk: int) -> _Intervals:
    return _Intervals(
        _pad(intervals.query_position, 1, bq, -1),
        _pad(intervals.key_position, 2, bk, roles_lib.NO_END),
        _pad(intervals.key_end, 2, bk, 0),
    )


def _live_blocks(intervals: _Intervals, reach: jax.Array, bq: int, bk: int) -> tuple[jax.Array, jax.Array]:
    """Key blocks that hold a pair with ``key_position <= query_position < reach``, by query block.

    Returns ``(order, count)``: int32 ``[n_q, n_k]``, whose first ``count[i]`` entries are query block i's live list.
    """

    def blocks(x, block):
        return x.reshape(*x.shape[:-1], -1, block)

    position = blocks(intervals.query_position, bq)
    last = jnp.max(position, -1)
    first = jnp.min(jnp.where(position < 0, roles_lib.NO_END, position), -1)
    begin = jnp.min(blocks(intervals.key_position, bk), -1)
    end = jnp.max(blocks(reach, bk), -1)
    alive = (begin[:, :, None, :] <= last[:, None, :, None]) & (end[:, :, None, :] > first[:, None, :, None])
    alive = jnp.any(alive, axis=(0, 1))
    order = jnp.argsort(~alive, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(alive, axis=-1, dtype=jnp.int32)


class _Tile(NamedTuple):
    """The integer row and columns of one tile, shaped to broadcast against ``[b, k, g, t, s]``."""

    at: jax.Array  # [b, 1, 1, t, 1]
    begin: jax.Array  # [b, k, 1, 1, s]
    visible: jax.Array  # bool [b, k, 1, t, s]


def _tile(intervals: _Intervals, i, j, bq: int, bk: int) -> _Tile:
    at = _slice(intervals.query_position, i, bq, 1)[:, None, None, :, None]
    begin = _slice(intervals.key_position, j, bk, 2)[:, :, None, None, :]
    end = _slice(intervals.key_end, j, bk, 2)[:, :, None, None, :]
    return _Tile(at, begin, (begin <= at) & (at < end))


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _forward(query, key, value, intervals: _Intervals, scale: float) -> tuple[jax.Array, jax.Array]:
    """``(out [b, k, g, t, h] in the query's dtype, lse float32 [b, k, g, t])``."""
    b, k, g, t, _ = query.shape
    bq, bk = _block(t), _block(key.shape[2])
    query, key, value = _pad(query, 3, bq, 0), _pad(key, 2, bk, 0), _pad(value, 2, bk, 0)
    intervals = _pad_intervals(intervals, bq, bk)
    order, count = _live_blocks(intervals, intervals.key_end, bq, bk)

    def query_block(i):
        rows = _slice(query, i, bq, 3)

        def step(n, carry):
            top, total, acc = carry
            j = order[i, n]
            logits = scale * _dot("bkgth,bksh->bkgts", rows, _slice(key, j, bk, 2))
            logits = jnp.where(_tile(intervals, i, j, bq, bk).visible, logits, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(logits, -1))
            shift = jnp.where(jnp.isneginf(new_top), 0, new_top)  # a row that has seen no key yet
            weights = jnp.exp(logits - shift[..., None])
            decay = jnp.exp(top - shift)
            acc = acc * decay[..., None] + _dot(
                "bkgts,bksh->bkgth", weights.astype(value.dtype), _slice(value, j, bk, 2)
            )
            return new_top, total * decay + jnp.sum(weights, -1), acc

        start = (
            jnp.full((b, k, g, bq), -jnp.inf, jnp.float32),
            jnp.zeros((b, k, g, bq), jnp.float32),
            jnp.zeros((b, k, g, bq, value.shape[-1]), jnp.float32),
        )
        top, total, acc = jax.lax.fori_loop(0, count[i], step, start)
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return out.astype(query.dtype), top + jnp.log(total)  # -inf + -inf in a row without a key

    out, lse = jax.lax.map(query_block, jnp.arange(order.shape[0], dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, 3).reshape(b, k, g, -1, value.shape[-1])[:, :, :, :t]
    return out, jnp.moveaxis(lse, 0, 3).reshape(b, k, g, -1)[:, :, :, :t]


def _role_sums(e, tile: _Tile, columns: _RoleColumns, window: int) -> _RoleSums:
    """The tile's part of every role sum; ``e`` float32 ``[b, k, t, s]``, 0 outside the reach."""
    at, begin = tile.at[:, :, 0], tile.begin[:, :, 0]
    n, n2, local = (x[:, :, None, :] for x in columns[1:])

    def total(where, axis=2):
        return jnp.sum(jnp.where(where, e, 0), axis=axis)

    return _RoleSums(
        all=jnp.sum(e, axis=2),
        own=total(at == begin),
        local=total((at > begin) & (at <= n)),
        sliding=total(at <= begin + window),
        past=total(local & (at > n) & (at <= n2)),
        row=total(local & (begin < at) & tile.visible[:, :, 0], axis=3),
    )


def _backward(query, key, value, intervals: _Intervals, scale, out, lse, dout, dlse, columns, window):
    """``(dquery, dkey, dvalue, sums)``, float32; ``sums`` is None when ``columns`` is.

    ``dlse`` float32 ``[b, k, g, t]``; ``columns`` (``_RoleColumns`` or None) asks for the role sums.
    """
    t, s = query.shape[3], key.shape[2]
    bq, bk = _block(t), _block(s)
    # delta = dout · out is what the softmax's normalisation takes from every pair; a gradient of lse gives to it.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    # A row without a visible key has lse = -inf and no gradient: exp(x - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    query, dout = _pad(query, 3, bq, 0), _pad(dout, 3, bq, 0)
    key, value = _pad(key, 2, bk, 0), _pad(value, 2, bk, 0)
    lse, delta = _pad(lse, 3, bq, jnp.inf), _pad(delta, 3, bq, 0)
    intervals = _pad_intervals(intervals, bq, bk)
    if columns is not None:
        columns = _RoleColumns(*(_pad(x, 2, bk, 0) for x in columns))
    order, count = _live_blocks(intervals, intervals.key_end if columns is None else columns.reach, bq, bk)

    def tile_gradients(i, j):
        rows, columns_of = _slice(query, i, bq, 3), _slice(key, j, bk, 2)
        tile = _tile(intervals, i, j, bq, bk)
        logits = scale * _dot("bkgth,bksh->bkgts", rows, columns_of)
        # Visible pairs have x <= lse; masked-out ones may exceed it, and the clip keeps their ratio at 1.
        ratio = jnp.exp(jnp.minimum(logits - _slice(lse, i, bq, 3)[..., None], 0))
        dout_rows = _slice(dout, i, bq, 3)
        dp = _dot("bkgth,bksh->bkgts", dout_rows, _slice(value, j, bk, 2))
        e = ratio * (dp - _slice(delta, i, bq, 3)[..., None])
        ds = (scale * jnp.where(tile.visible, e, 0)).astype(key.dtype)
        p = jnp.where(tile.visible, ratio, 0).astype(dout.dtype)
        dquery = _dot("bkgts,bksh->bkgth", ds, columns_of)
        dkey = _dot("bkgts,bkgth->bksh", ds, rows)
        dvalue = _dot("bkgts,bkgth->bksh", p, dout_rows)
        sums = None
        if columns is not None:
            block_columns = _RoleColumns(*(_slice(x, j, bk, 2) for x in columns))
            reached = (tile.begin <= tile.at) & (tile.at < block_columns.reach[:, :, None, None, :])
            e = jnp.where(reached[:, :, 0], jnp.sum(e, axis=2), 0)
            sums = _role_sums(e, tile, block_columns, window)
        return dquery, dkey, dvalue, sums

    def query_block(i, carry):
        def step(n, carry):
            j = order[i, n]
            dquery, dkey, dvalue, sums = tile_gradients(i, j)
            total_q, total_k, total_v, total_sums = carry
            if sums is not None:
                by_key = [_add(x, y, j, bk, 2) for x, y in zip(total_sums[:-1], sums[:-1], strict=True)]
                total_sums = _RoleSums._make([*by_key, _add(total_sums.row, sums.row, i, bq, 2)])
            return (
                _add(total_q, dquery, i, bq, 3),
                _add(total_k, dkey, j, bk, 2),
                _add(total_v, dvalue, j, bk, 2),
                total_sums,
            )

        return jax.lax.fori_loop(0, count[i], step, carry)

    def zeros(like, *last):
        return jnp.zeros((*like.shape[:2], *last), jnp.float32)

    sums = None
    if columns is not None:
        sums = _RoleSums._make([zeros(key, key.shape[2])] * 5 + [zeros(key, query.shape[3])])
    carry = (*(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value)), sums)
    dquery, dkey, dvalue, sums = jax.lax.fori_loop(0, order.shape[0], query_block, carry)
    if sums is not None:
        sums = _RoleSums._make([*(x[:, :, :s] for x in sums[:-1]), sums.row[:, :, :t]])
    return dquery[:, :, :, :t], dkey[:, :, :s], dvalue[:, :, :s], sums


def _heads_first(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array]:
    """To the inner layout: ``[b, t, n, h]`` → ``[b, k, g, t, h]`` and ``[b, s, k, h]`` → ``[b, k, s, h]``."""
    b, t, n, h = query.shape
    k = key.shape[2]
    query = jnp.moveaxis(query.reshape(b, t, k, n // k, h), 1, 3)
    return query, jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)


def _heads_last(x: jax.Array) -> jax.Array:
    """``[b, k, g, t, …]`` → ``[b, t, n, …]``."""
    b, k, g, t = x.shape[:4]
    return jnp.moveaxis(x, 3, 1).reshape(b, t, k * g, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale",))
def interval_attention(query, key, value, key_end, query_position, key_position, scale):
    """``(out, lse)`` as ``api.interval_attention`` defines them, all arguments given; lse float32 ``[b, t, n]``."""
    return _interval_fwd(query, key, value, key_end, query_position, key_position, scale)[0]


def _interval_fwd(query, key, value, key_end, query_position, key_position, scale):
    intervals = _Intervals(query_position, key_position, key_end)
    out, lse = _forward(*_heads_first(query, key, value), intervals, scale)
    return (_heads_last(out), _heads_last(lse)), (query, key, value, intervals, out, lse)


def _interval_bwd(scale, residuals, cotangents):
    query, key, value, intervals, out, lse = residuals
    dout, dlse = cotangents
    grouped = _heads_first(query, key, value)
    dout = _heads_first(dout, key, value)[0]
    dlse = _heads_first(dlse[..., None], key, value)[0][..., 0]
    dquery, dkey, dvalue, _ = _backward(*grouped, intervals, scale, out, lse, dout, dlse, None, 0)
    return (*_like((query, key, value), dquery, dkey, dvalue), None, None, None)


def _like(primals, dquery, dkey, dvalue):
    """Gradients in the outer layout and in the dtype of what they are the gradient of."""
    outer = (_heads_last(dquery), jnp.moveaxis(dkey, 2, 1), jnp.moveaxis(dvalue, 2, 1))
    return tuple(x.astype(primal.dtype) for x, primal in zip(outer, primals, strict=True))


interval_attention.defvjp(_interval_fwd, _interval_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnames=("window", "scale", "visible_only"))
def nats_attention(query, key, value, roles, document_end, window, scale, visible_only):
    """``out`` as ``api.nats_attention`` defines it, all arguments given (``document_end`` may be None).

    ``visible_only`` leaves the masked-out pairs out of the role gradient (``Visible()``).
    """
    return _nats_fwd(query, key, value, roles, document_end, window, scale, visible_only)[0]


def _nats_fwd(query, key, value, roles, document_end, window, scale, visible_only):
    (b, t), s, k = query.shape[:2], key.shape[1], key.shape[2]
    key_end = roles_lib.key_end_from_roles(jnp.argmax(roles, -1), window=window, document_end=document_end)
    intervals = _Intervals(
        jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)),
        jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, k, s)),
        key_end,
    )
    out, lse = _forward(*_heads_first(query, key, value), intervals, scale)
    return _heads_last(out), (query, key, value, roles, document_end, intervals, out, lse)


def _nats_bwd(window, scale, visible_only, residuals, dout):
    query, key, value, roles, document_end, intervals, out, lse = residuals
    role_ids = jnp.argmax(roles, axis=-1)
    is_global, is_local = role_ids == roles_lib.GLOBAL, role_ids == roles_lib.LOCAL
    ranges = roles_lib.role_ranges(is_global, document_end)
    reach = jnp.minimum(intervals.key_end, ranges.end) if visible_only else ranges.end
    columns = _RoleColumns(reach, ranges.next_global, ranges.second_global, is_local)
    grouped = _heads_first(query, key, value)
    dout = _heads_first(dout, key, value)[0]
    dquery, dkey, dvalue, sums = _backward(
        *grouped, intervals, scale, out, lse, dout, jnp.zeros_like(lse), columns, window
    )
    credit = roles_lib.global_credit(
        is_global,
        column=jnp.where(is_local, sums.local, 0),
        row=sums.row,
        past=sums.past,
        document_end=document_end,
    )
    droles = jnp.stack([sums.all - credit, sums.own + sums.local, sums.sliding], axis=-1)
    return (*_like((query, key, value), dquery, dkey, dvalue), droles.astype(roles.dtype), None)


nats_attention.defvjp(_nats_fwd, _nats_bwd)
