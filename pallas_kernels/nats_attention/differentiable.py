"""Attention and its gradients, put together from the three passes that a backend offers.

``backend.Backend`` defines the passes. Here the keys are rearranged, the passes called, and their sums converted to
the gradient of the roles; in the inner layout, the sequence is after the heads: query ``[b, k, g, t, h]``, key
``[b, k, s, h]``.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k · g``, ``h``
head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention import layout as layout_lib
from pallas_kernels.nats_attention import roles as roles_lib
from pallas_kernels.nats_attention.backend import Backend, Intervals, Rows
from pallas_kernels.nats_attention.layout import Layout
from pallas_kernels.nats_attention.roles import RoleColumns, RoleSums
from pallas_kernels.nats_attention.sampling import SampledRows, draw_rows
from pallas_kernels.nats_attention.tiling import Tiling


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a call.

    Attributes:
      backend: the module with the passes.
      tiling: for the backend.
      scale: of the logits.
      windows: of the SLIDING roles, ascending; none where there are no roles.
      sampled: fraction of the masked-out pairs in the role gradient: 1 all of them, 0 none.
      return_lse: True where ``nats_attention`` returns its log-sum-exp too. (``interval_attention`` always does.)
    """

    backend: Backend
    tiling: Tiling
    scale: float
    windows: tuple[int, ...] = ()
    sampled: float = 1.0
    return_lse: bool = False


def heads_first(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Converts to the inner layout: ``[b, t, n, h]`` → ``[b, k, g, t, h]`` and ``[b, s, k, h]`` → ``[b, k, s, h]``."""
    return rows_first(query, key.shape[2]), jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)


def rows_first(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """Converts ``[b, t, n, …]`` to ``[b, k, g, t, …]``."""
    b, t, n = x.shape[:3]
    return jnp.moveaxis(x.reshape(b, t, num_kv_heads, n // num_kv_heads, *x.shape[3:]), 1, 3)


def heads_last(x: jax.Array) -> jax.Array:
    """Converts ``[b, k, g, t, …]`` to ``[b, t, n, …]``."""
    b, k, g, t = x.shape[:4]
    return jnp.moveaxis(x, 3, 1).reshape(b, t, k * g, *x.shape[4:])


def _by_slot(layout: Layout | None, *arrays):
    return arrays if layout is None else tuple(layout_lib.gather(layout, x) for x in arrays)


def _by_key(layout: Layout | None, x: jax.Array) -> jax.Array:
    return x if layout is None else layout_lib.scatter_back(layout, x)


def attend(query, key, value, intervals: Intervals, settings: Settings):
    """Returns ``(out, lse)`` in the inner layout."""
    layout, by_slot = layout_lib.arrange_for(intervals, settings.tiling)
    query, key, value = heads_first(query, key, value)
    key, value = _by_slot(layout, key, value)
    return settings.backend.forward(query, key, value, by_slot, settings.scale, settings.tiling)


def rows_of(query, out, lse, dout, dlse) -> Rows:
    """Computes ``delta = dout · out``, which a pair loses by the softmax's normalization, less the gradient of lse.

    ``query`` and ``lse`` in the inner layout, the others in the outer one: ``out``, ``dout [b, t, n, h]``,
    ``dlse [b, t, n]`` or None. The sum is taken there, so that no copy of ``out`` in the inner layout is needed for it.
    """
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)
    delta = rows_first(delta if dlse is None else delta - dlse, query.shape[1])
    empty = jnp.isneginf(lse)  # exp(x - inf) = 0: no gradient, whatever the gradient of a log-sum-exp of -inf
    dout = rows_first(dout, query.shape[1])
    return Rows(query, dout, jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0, delta))


def visible_pass(rows: Rows, key, value, intervals, columns: RoleColumns | None, settings: Settings):
    """Runs the backend's visible pass on rearranged keys; results are by key. ``key``, ``value`` ``[b, k, s, h]``."""
    layout, by_slot = layout_lib.arrange_for(intervals, settings.tiling)
    key, value = _by_slot(layout, key, value)
    if columns is not None:
        columns = RoleColumns(*_by_slot(layout, *columns))
    dquery, dkey, dvalue, sums = settings.backend.visible_pass(
        rows, key, value, by_slot, columns, settings.scale, settings.windows, settings.tiling
    )
    if sums is not None:
        sums = sums.map_keys(functools.partial(_by_key, layout))
    return dquery, _by_key(layout, dkey), _by_key(layout, dvalue), sums


def _like(primals, dquery, dkey, dvalue):
    """Converts gradients to the outer layout and to the dtypes of the arguments."""
    outer = (heads_last(dquery), jnp.moveaxis(dkey, 2, 1), jnp.moveaxis(dvalue, 2, 1))
    return tuple(x.astype(primal.dtype) for x, primal in zip(outer, primals, strict=True))


def interval_attention(query, key, value, intervals: Intervals, settings: Settings):
    """Returns ``(out [b, t, n, h], lse float32 [b, t, n])`` as ``api.interval_attention`` defines them."""
    primals = (query, key, value)
    # An operand that shards share has a gradient that is summed over them: the transpose of this.
    primals = vary_like(primals, (primals, intervals))
    return _interval_attention(*primals, intervals, settings)


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings",))
def _interval_attention(query, key, value, intervals, settings):
    return _interval_fwd(query, key, value, intervals, settings)[0]


def _interval_fwd(query, key, value, intervals, settings):
    out, lse = attend(query, key, value, intervals, settings)
    out = heads_last(out)
    return (out, heads_last(lse)), (query, key, value, intervals, out, lse)


def _interval_bwd(settings, residuals, cotangents):
    query, key, value, intervals, out, lse = residuals
    inner_query, inner_key, inner_value = heads_first(query, key, value)
    rows = rows_of(inner_query, out, lse, *cotangents)
    dquery, dkey, dvalue, _ = visible_pass(rows, inner_key, inner_value, intervals, None, settings)
    return (*_like((query, key, value), dquery, dkey, dvalue), None)


_interval_attention.defvjp(_interval_fwd, _interval_bwd)


def nats_attention(query, key, value, roles, document_end, sample_key, settings: Settings):
    """Returns ``out [b, t, n, h]`` as ``api.nats_attention`` defines it; ``document_end``, ``sample_key`` or None.

    With ``settings.return_lse`` it is ``(out, lse float32 [b, t, n])``.
    """
    primals = (query, key, value, roles)
    primals = vary_like(primals, (primals, document_end, sample_key))
    return _nats_attention(*primals, document_end, sample_key, settings)


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings",))
def _nats_attention(query, key, value, roles, document_end, sample_key, settings):
    return _nats_fwd(query, key, value, roles, document_end, sample_key, settings)[0]


def _nats_fwd(query, key, value, roles, document_end, sample_key, settings):
    (b, t), k = query.shape[:2], key.shape[2]
    role_ids = jnp.argmax(roles, -1).astype(jnp.int8)
    key_end = roles_lib.key_end_from_roles(role_ids, window=settings.windows, document_end=document_end)
    index = jnp.arange(t, dtype=jnp.int32)
    intervals = Intervals(jnp.broadcast_to(index, (b, t)), jnp.broadcast_to(index, (b, k, t)), key_end)
    out, lse = attend(query, key, value, intervals, settings)
    out = heads_last(out)
    witness = jnp.zeros((), roles.dtype)  # the roles' dtype, which an int8 copy of them forgets
    results = (out, heads_last(lse)) if settings.return_lse else out
    return results, (query, key, value, role_ids, witness, document_end, sample_key, intervals, out, lse)


def _nats_bwd(settings, residuals, cotangents):
    dout, dlse = cotangents if settings.return_lse else (cotangents, None)
    query, key, value, role_ids, witness, document_end, sample_key, intervals, out, lse = residuals
    columns = roles_lib.role_columns(role_ids, intervals.key_end, document_end)
    inner_query, inner_key, inner_value = heads_first(query, key, value)
    rows = rows_of(inner_query, out, lse, dout, dlse)
    dquery, dkey, dvalue, sums = visible_pass(rows, inner_key, inner_value, intervals, columns, settings)
    if settings.sampled:
        chosen = _sample(sample_key, query.shape[1], settings)
        hidden = masked_out_sums(rows, inner_key, inner_value, intervals, columns, chosen, settings)
        sums = jax.tree.map(jnp.add, sums, hidden)
    droles = roles_lib.role_gradient(sums, columns, document_end)
    return (*_like((query, key, value), dquery, dkey, dvalue), droles.astype(witness.dtype), None, None)


def _sample(key, length: int, settings: Settings) -> SampledRows | None:
    """Returns the queries of the masked-out pass; None: all of them."""
    if settings.sampled == 1:
        return None
    return draw_rows(key, length=length, fraction=settings.sampled, run=settings.tiling.sampled_run)


def masked_out_sums(
    rows: Rows,
    key,
    value,
    intervals: Intervals,
    columns: RoleColumns,
    chosen: SampledRows | None,
    settings: Settings,
) -> RoleSums:
    """Runs the backend's masked-out pass over every query, or over the sampled ones (by their index among the rows)."""
    if chosen is None:
        weight = jnp.ones(rows.query.shape[3], jnp.float32)
    else:
        weight = chosen.weight
        rows = Rows(*(jnp.take(x, chosen.queries, axis=3) for x in rows))
        intervals = intervals._replace(query_position=jnp.take(intervals.query_position, chosen.queries, axis=1))
    sums = settings.backend.masked_out_pass(
        rows, key, value, intervals, weight, columns, settings.scale, settings.windows, settings.tiling
    )
    return sums._replace(row=jnp.zeros((), jnp.float32))


_nats_attention.defvjp(_nats_fwd, _nats_bwd)
