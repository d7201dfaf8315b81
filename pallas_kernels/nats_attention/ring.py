"""Attention over a sequence that is divided among devices, inside ``jax.shard_map``: keys and values go round a ring.

Each device comes with an equal, contiguous part of the sequence. Causal work grows with the index, so the parts are
first exchanged for two pieces each, an early and a late one, which together cost the same on every device. Then the
queries stay and the keys and values travel: in each of as many steps as there are devices, every device attends to the
pieces that are with it and passes them on; in the backward their gradients and role sums travel along. No device ever
holds the keys of the whole sequence. What it does hold of it are a few integers for each token: roles and ends of
documents are gathered first, for a key's end depends on roles of other devices.

Axis letters as in ``differentiable``; ``t`` and ``s`` are a device's part, ``L`` is the whole sequence.

Source of the ring: arXiv:2310.01889.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention import differentiable as one_device
from pallas_kernels.nats_attention import roles as roles_lib
from pallas_kernels.nats_attention.backend import Intervals, Rows
from pallas_kernels.nats_attention.differentiable import Settings
from pallas_kernels.nats_attention.roles import RoleColumns, RoleSums
from pallas_kernels.nats_attention.sampling import SampledRows, draw_rows

# --- who holds what ---


def _pieces(device: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers of the early and the late piece of a device; there are twice as many pieces as devices."""
    return device, 2 * jax.lax.axis_size(axis_name) - 1 - device


def _positions(device: jax.Array, length: int, axis_name: str) -> jax.Array:
    """Returns the indices in the sequence of a device's tokens, int32 ``[length]``, ascending."""
    index = jnp.arange(length // 2, dtype=jnp.int32)
    return jnp.concatenate([piece * (length // 2) + index for piece in _pieces(device, axis_name)])


def _part_of(x: jax.Array, device: jax.Array, axis_name: str, axis: int = -1) -> jax.Array:
    """Returns a device's part of an array over the whole sequence."""
    size = x.shape[axis] // (2 * jax.lax.axis_size(axis_name))
    pieces = (jax.lax.dynamic_slice_in_dim(x, n * size, size, axis) for n in _pieces(device, axis_name))
    return jnp.concatenate(list(pieces), axis)


def _ways(axis_name: str) -> list[list[tuple[int, int]]]:
    """Returns where the first and the second half of each contiguous part go: two permutations of the devices."""
    size = jax.lax.axis_size(axis_name)
    holder = [*range(size), *reversed(range(size))]  # of each piece
    return [[(device, holder[2 * device + half]) for device in range(size)] for half in (0, 1)]


def _balance(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Converts a device's contiguous part to its early and late piece."""
    halves = jnp.split(x, 2, axis)
    even, odd = (jax.lax.ppermute(half, axis_name, way) for half, way in zip(halves, _ways(axis_name), strict=True))
    # Even pieces came one way, odd ones the other; the early piece has the device's own number.
    early_is_even = jax.lax.axis_index(axis_name) % 2 == 0
    return jnp.concatenate([jnp.where(early_is_even, even, odd), jnp.where(early_is_even, odd, even)], axis)


def _unbalance(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Converts early and late pieces back to the contiguous part."""
    early, late = jnp.split(x, 2, axis)
    early_is_even = jax.lax.axis_index(axis_name) % 2 == 0
    halves = (jnp.where(early_is_even, early, late), jnp.where(early_is_even, late, early))
    back = ([(there, here) for here, there in way] for way in _ways(axis_name))
    return jnp.concatenate(
        [jax.lax.ppermute(half, axis_name, way) for half, way in zip(halves, back, strict=True)], axis
    )


def _gather(x: jax.Array, axis_name: str, axis: int = -1) -> jax.Array:
    """Gathers the whole sequence from contiguous parts: for integers and sums, never for keys."""
    return jax.lax.all_gather(x, axis_name, axis=axis % x.ndim, tiled=True)


def _go_round(visit: Callable, carry: Any, keys: Any, gathered: Any, axis_name: str) -> tuple[Any, Any]:
    """Takes the keys of all devices to all devices: the one place where they are exchanged.

    Args:
      visit: ``visit(carry, gathered, keys, device) → (carry, gathered)``, with the keys that ``device`` holds at home
        and what was gathered for them so far.
      carry: stays here.
      keys: arrays that travel.
      gathered: arrays that travel with them and change.
      axis_name: of the mesh.

    Returns:
      ``(carry, gathered)``, the second at home again.
    """
    size, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    onward = [(device, (device + 1) % size) for device in range(size)]

    def pass_on(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, onward), tree)

    def step(state, number):
        carry, keys, gathered = state
        following = pass_on(keys)  # on its way while this is computed
        carry, gathered = visit(carry, gathered, keys, (here - number) % size)
        return (carry, following, pass_on(gathered)), None

    (carry, _, gathered), _ = jax.lax.scan(step, (carry, keys, gathered), jnp.arange(size, dtype=jnp.int32))
    return carry, gathered


# --- one step of the ring ---


def _intervals(query, key_end, device, axis_name: str) -> Intervals:
    """Returns the intervals of this device's queries, ``query [b, t, n, h]``, and the keys of ``device``."""
    b, t = query.shape[:2]
    at = _positions(jax.lax.axis_index(axis_name), t, axis_name)
    end = _part_of(key_end, device, axis_name)
    begin = _positions(device, t, axis_name)
    return Intervals(jnp.broadcast_to(at, (b, t)), jnp.broadcast_to(begin, end.shape), end)


def _attend(query, key, value, key_end, settings: Settings, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Computes ``(out [b, t, n, h], lse [b, k, g, t])`` of balanced parts; ``key_end [b, k, L]``."""

    def visit(carry, _, keys, device):
        (out, lse), (key, value) = carry, keys
        intervals = _intervals(query, key_end, device, axis_name)
        more, more_lse = one_device.attend(query, key, value, intervals, settings)
        both = jnp.logaddexp(lse, more_lse)
        fractions = (jnp.where(jnp.isneginf(x), 0, jnp.exp(x - both))[..., None] for x in (lse, more_lse))
        return (sum(part * x.astype(jnp.float32) for part, x in zip(fractions, (out, more), strict=True)), both), None

    inner = one_device.rows_first(query, key.shape[2])
    start = (jnp.zeros(inner.shape, jnp.float32), jnp.full(inner.shape[:-1], -jnp.inf, jnp.float32))
    (out, lse), _ = _go_round(visit, vary_like(start, (query, key, value, key_end)), (key, value), None, axis_name)
    return one_device.heads_last(out).astype(query.dtype), lse


def _gradients(rows: Rows, query, key, value, key_end, columns: RoleColumns | None, chosen, settings, axis_name):
    """Computes ``(dquery, dkey, dvalue, sums)`` of balanced parts, inner layout; ``columns [b, k, L]`` or None."""

    def visit(carry, gathered, keys, device):
        (dquery, row), (key, value) = carry, keys
        intervals = _intervals(query, key_end, device, axis_name)
        of_keys = None if columns is None else RoleColumns(*(_part_of(x, device, axis_name) for x in columns))
        more, *to_keys, sums = one_device.visible_pass(rows, key, value, intervals, of_keys, settings)
        if sums is not None and of_keys is not None:
            row += sums.row
            if settings.sampled:
                hidden = one_device.masked_out_sums(rows, key, value, intervals, of_keys, chosen, settings)
                sums = jax.tree.map(jnp.add, sums, hidden)
            to_keys.append(sums._replace(row=jnp.float32(0)))  # rows stay
        return (dquery + more, row), jax.tree.map(jnp.add, gathered, to_keys)

    inner_key, inner_value = (jnp.moveaxis(x, 1, 2) for x in (key, value))
    by_key = jnp.zeros(inner_key.shape, jnp.float32)
    zeros = by_key[..., 0]
    near = (zeros,) * len(settings.windows)
    sums = [] if columns is None else [RoleSums(zeros, zeros, zeros, near, zeros, jnp.float32(0))]
    carry = (jnp.zeros(rows.query.shape, jnp.float32), zeros)
    start = vary_like((carry, [by_key, by_key, *sums]), (rows, inner_key, inner_value, key_end))
    (dquery, row), (dkey, dvalue, *sums) = _go_round(visit, start[0], (inner_key, inner_value), start[1], axis_name)
    return dquery, dkey, dvalue, sums[0]._replace(row=row) if sums else None


def _like(primals, dquery, dkey, dvalue, axis_name):
    """Converts gradients to the callers' parts and to the dtypes of the arguments."""
    outer = (one_device.heads_last(dquery), jnp.moveaxis(dkey, 2, 1), jnp.moveaxis(dvalue, 2, 1))
    return tuple(_unbalance(x.astype(y.dtype), axis_name, 1) for x, y in zip(outer, primals, strict=True))


# --- the two attentions ---


def interval_attention(query, key, value, key_end, settings: Settings, axis_name: str):
    """Computes ``(out [b, t, n, h], lse float32 [b, t, n])`` of a device's part; see ``api.interval_attention``."""
    primals = vary_like((query, key, value), (query, key, value, key_end, jax.lax.axis_index(axis_name)))
    return _interval_attention(*primals, key_end, settings, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings", "axis_name"))
def _interval_attention(query, key, value, key_end, settings, axis_name):
    return _interval_fwd(query, key, value, key_end, settings, axis_name)[0]


def _interval_fwd(query, key, value, key_end, settings, axis_name):
    query, key, value = (_balance(x, axis_name, 1) for x in (query, key, value))
    key_end = _gather(key_end, axis_name)
    out, lse = _attend(query, key, value, key_end, settings, axis_name)
    results = tuple(_unbalance(x, axis_name, 1) for x in (out, one_device.heads_last(lse)))
    return results, (query, key, value, key_end, out, lse)


def _interval_bwd(settings, axis_name, residuals, cotangents):
    query, key, value, key_end, out, lse = residuals
    dout, dlse = (_balance(x, axis_name, 1) for x in cotangents)
    rows = one_device.rows_of(one_device.rows_first(query, key.shape[2]), out, lse, dout, dlse)
    dquery, dkey, dvalue, _ = _gradients(rows, query, key, value, key_end, None, None, settings, axis_name)
    return (*_like((query, key, value), dquery, dkey, dvalue, axis_name), None)


_interval_attention.defvjp(_interval_fwd, _interval_bwd)


def nats_attention(query, key, value, roles, document_end, sample_key, settings: Settings, axis_name: str):
    """Computes ``out [b, t, n, h]`` of a device's part, with ``settings.return_lse`` ``(out, lse float32 [b, t, n])``.

    See ``api.nats_attention``.
    """
    primals = (query, key, value, roles)
    primals = vary_like(primals, (primals, document_end, sample_key, jax.lax.axis_index(axis_name)))
    return _nats_attention(*primals, document_end, sample_key, settings, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings", "axis_name"))
def _nats_attention(query, key, value, roles, document_end, sample_key, settings, axis_name):
    return _nats_fwd(query, key, value, roles, document_end, sample_key, settings, axis_name)[0]


def _nats_fwd(query, key, value, roles, document_end, sample_key, settings, axis_name):
    role_ids = _gather(jnp.argmax(roles, -1).astype(jnp.int8), axis_name)
    document_end = None if document_end is None else _gather(document_end, axis_name)
    key_end = roles_lib.key_end_from_roles(role_ids, window=settings.windows, document_end=document_end)
    query, key, value = (_balance(x, axis_name, 1) for x in (query, key, value))
    out, lse = _attend(query, key, value, key_end, settings, axis_name)
    witness = jnp.zeros((), roles.dtype)  # the roles' dtype, which an int8 copy of them forgets
    residuals = (query, key, value, role_ids, witness, document_end, sample_key, key_end, out, lse)
    if settings.return_lse:
        return tuple(_unbalance(x, axis_name, 1) for x in (out, one_device.heads_last(lse))), residuals
    return _unbalance(out, axis_name, 1), residuals


def _nats_bwd(settings, axis_name, residuals, cotangents):
    query, key, value, role_ids, witness, document_end, sample_key, key_end, out, lse = residuals
    columns = roles_lib.role_columns(role_ids, key_end, document_end)
    given = cotangents if settings.return_lse else (cotangents,)
    dout, dlse = (*(_balance(x, axis_name, 1) for x in given), None)[:2]
    rows = one_device.rows_of(one_device.rows_first(query, key.shape[2]), out, lse, dout, dlse)
    chosen = _sample(sample_key, query.shape[1], settings, axis_name)
    dquery, dkey, dvalue, sums = _gradients(rows, query, key, value, key_end, columns, chosen, settings, axis_name)
    # The credit of a token's role depends on sums over tokens of other devices: five numbers or more for each.
    whole = jax.tree.map(lambda x: _gather(_unbalance(x, axis_name, 2), axis_name), sums)
    droles = roles_lib.role_gradient(whole, columns, document_end).astype(witness.dtype)
    length = query.shape[1]
    own = jax.lax.dynamic_slice_in_dim(droles, jax.lax.axis_index(axis_name) * length, length, 2)
    return (*_like((query, key, value), dquery, dkey, dvalue, axis_name), own, None, None)


def _sample(key, length: int, settings: Settings, axis_name: str) -> SampledRows | None:
    """Returns this device's queries of one sample over the whole sequence, by their index among its rows; None: all."""
    if settings.sampled in (0, 1):
        return None
    piece = length // 2
    parts = 2 * jax.lax.axis_size(axis_name)
    run = settings.tiling.sampled_run
    while piece % run:  # pieces are whole runs
        run -= 1
    drawn = draw_rows(key, length=piece * parts, fraction=settings.sampled, run=run, parts=parts)
    here = jax.lax.axis_index(axis_name)
    queries, weight = (_part_of(x, here, axis_name) for x in drawn)
    early, late = _pieces(here, axis_name)
    is_late = queries >= late * piece
    return SampledRows(queries - jnp.where(is_late, late * piece - piece, early * piece), weight)


_nats_attention.defvjp(_nats_fwd, _nats_bwd)
