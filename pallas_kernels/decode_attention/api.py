"""The public functions: they check the arguments, choose a backend and add the token's own key."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import as_int32, check_floats, check_head_dim, checked_scale
from pallas_kernels.decode_attention import cudnn, pallas_tpu, reference, xla
from pallas_kernels.decode_attention.backend import Backend
from pallas_kernels.decode_attention.storage import Format, Storage
from pallas_kernels.platforms import current_platform, general_name

BACKENDS: dict[str, Backend] = {"pallas_tpu": pallas_tpu, "cudnn": cudnn, "xla": xla}
"""Tried in this order, where the platform is theirs."""


def storage_format(platform: str | None = None) -> Format:
    """Returns the format that buffers should have on a platform ("cpu", "gpu", "cuda", "tpu"); None: the current."""
    platform = current_platform() if platform is None else general_name(platform)
    if platform == "cpu":
        return "transposed"
    return next(backend.READS[0] for backend in BACKENDS.values() if platform in backend.PLATFORMS)


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    storage: Storage,
    *,
    key_end: jax.Array,
    length: jax.Array,
    position: jax.Array,
    layer: jax.Array | int = 0,
    sink: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes attention of one token of each sequence over its own key and the live slots of a KV buffer.

    A slot is read when ``position < key_end``; from ``length`` on there is none. The buffer holds the past: the token's
    own key is written after. Where no slot is read, the result is the token's own value. On a mesh call it inside
    ``jax.shard_map``, batch and heads divided.

    Logits and sums are float32, whatever the dtype of the arguments. The slots of a block that holds one below
    ``length`` must be finite, read or not, as they are in a buffer that began with zeros; other blocks may hold
    anything.

    Args:
      query: ``[b, n, h]``, float; the query heads of one KV head are neighbors.
      key, value: ``[b, k, h]``, of the same tokens.
      storage: keys and values of some layers.
      key_end: int32 ``[l, b, k, c]``, exclusive; at most ``position`` (so 0, or less) in a free slot, ``NO_END``
        where nothing ends. Other integers are cut to the range of int32.
      length: int32 ``[l, b, k]``: from this slot on all are free, ``key_end <= position``; cut to ``0 … c``.
      position: int32 ``[b]``, index of each token: 0 or more, and a smaller number counts as 0, so that no free slot
        is read.
      layer: number of the layer, int32 scalar; a traced one is clipped to ``0 … l-1``.
      sink: float ``[n]``, another logit of each head in the softmax's denominator, whose value is 0; None: without.
      scale: of the logits, a positive Python number; default ``h ** -0.5``.
      implementation: "pallas_tpu", "cudnn", "xla", "reference" (dense, for tests), or None for the first backend of
        this platform that can serve the call.

    Returns:
      ``[b, n, h]`` in the dtype of ``query``.

    Raises:
      ValueError: shapes or names that do not fit.
      NotImplementedError: no backend can serve the call; the message has each one's reason.

    Example:
      >>> storage = Storage.of(keys, values, storage_format(), block=128)  # [l, b, k, c, h]
      >>> out = decode_attention(q, k, v, storage, key_end=key_end, length=length, position=t, layer=3)
    """
    layers, b, k, c, h = storage.shape
    n = query.shape[1] if query.ndim == 3 else 0
    if query.shape != (b, n, h) or (n % k if k else n):
        raise ValueError(f"query {query.shape} does not fit a buffer of batch {b}, {k} KV heads of {h}.")
    for name, array in (("key", key), ("value", value)):
        if array.shape != (b, k, h):
            raise ValueError(f"{name} has shape {array.shape}; {(b, k, h)} was expected.")
    if sink is not None and sink.shape != (n,):
        raise ValueError(f"sink has shape {sink.shape}; {(n,)} was expected.")
    check_head_dim(h)
    check_floats(query=query, key=key, value=value, storage=storage)
    scale = checked_scale(scale, h)
    layer = _layer(layer, layers)
    key_end = as_int32("key_end", key_end, (layers, b, k, c))
    length = jnp.clip(as_int32("length", length, (layers, b, k)), 0, c)
    position = jnp.maximum(as_int32("position", position, (b,)), 0)
    if 0 in query.shape:  # no sequence or no head
        return query
    grouped = query.reshape(b, k, -1, h)
    if c:
        out, lse = _first_that_serves(implementation, (grouped, storage, key_end, length, position, layer, scale))
    else:
        out = jnp.zeros(grouped.shape, jnp.float32)
        lse = jnp.full(out.shape[:-1], -jnp.inf, out.dtype)
    # The own key, in the precision of the backend's results.
    wide = [x.astype(lse.dtype) for x in (grouped, key, value)]
    own = scale * jnp.einsum("bkgh,bkh->bkg", wide[0], wide[1], precision=jax.lax.Precision.HIGHEST)
    top = jnp.maximum(lse, own)
    if sink is not None:
        sink = sink.astype(lse.dtype).reshape(own.shape[1:])
        top = jnp.maximum(top, sink)
    past, new = jnp.exp(lse - top)[..., None], jnp.exp(own - top)[..., None]
    total = past + new if sink is None else past + new + jnp.exp(sink - top)[..., None]
    out = (past * out + new * wide[2][:, :, None]) / total
    return out.reshape(query.shape).astype(query.dtype)


def _layer(given: Any, layers: int) -> jax.Array:
    """Converts the number of a layer to int32; raises for one that is known and does not exist."""
    if not isinstance(given, jax.core.Tracer) and not 0 <= operator.index(given) < layers:
        raise ValueError(f"layer={given}: the buffer has layers 0 to {layers - 1}.")
    return jnp.clip(jnp.asarray(given, jnp.int32), 0, layers - 1)


def _first_that_serves(implementation: str | None, arguments: Sequence) -> tuple[jax.Array, jax.Array]:
    if implementation == "reference":  # dense: for tests, only by name
        return reference.attend(*arguments)
    if implementation is not None and implementation not in BACKENDS:
        known = ", ".join(map(repr, [*BACKENDS, "reference"]))
        raise ValueError(f"implementation={implementation!r}: one of {known} was expected.")
    platform = current_platform()
    storage: Storage = arguments[1]
    refusals = []
    for name, backend in BACKENDS.items():
        if implementation not in (None, name) or (implementation is None and platform not in backend.PLATFORMS):
            continue
        try:
            if storage.format not in backend.READS:
                raise NotImplementedError(f"the buffer is {storage.format}, it reads {' or '.join(backend.READS)}")
            backend.check(storage)
            return backend.attend(*arguments)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("no backend can serve this call; " + "; ".join(refusals))
