"""GPUs: cuDNN's attention, with KV heads folded into the batch so that each has a length of its own.

The library reads ``[0, length)`` of a head and takes a large number from the logits of slots that are free within. It
serves float16 and bfloat16. ``jax.nn.dot_product_attention`` is its public door, but rounds the log-sum-exp to the
dtype of the query; the weight of the token's own key beside all others hangs on it, so the function behind is called.

The library wants the keys of a layer as an array of their own: of a buffer with several layers, the layer is copied.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.storage import Format, Storage
from pallas_kernels.manual_axes import vary_alike

try:  # private: nothing public gives the log-sum-exp in float32
    from jax._src.cudnn import fused_attention_stablehlo as _library
except ImportError:
    _library = None  # type: ignore[assignment]

PLATFORMS: Sequence[str] = ("gpu",)
READS: Sequence[Format] = ("plain",)

_DTYPES = ("bfloat16", "float16")
_NOTHING, _NOTHING_FLOAT16 = -(2.0**40), -(2.0**14)
"""Log-sum-exps below are of masked slots alone: the library takes twice as much from a logit that is masked."""


def check(storage: Storage) -> None:
    """Raises NotImplementedError with the reason why a buffer cannot be served."""
    if _library is None:
        raise NotImplementedError(f"jax {jax.__version__} does not have cuDNN's attention where it is looked for")
    if storage.dtype.name not in _DTYPES:
        raise NotImplementedError(f"{storage.dtype.name} is not a dtype of cuDNN's attention; {_DTYPES} are")
    if storage.head_dim % 8:
        raise NotImplementedError(f"head dim {storage.head_dim} is no multiple of 8")
    if storage.num_blocks != 1:
        raise NotImplementedError(f"the slots of a head are in {storage.num_blocks} blocks")


def attend(
    query: jax.Array,
    storage: Storage,
    key_end: jax.Array,
    length: jax.Array,
    position: jax.Array,
    layer: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the slots: see ``backend.Backend``."""
    if query.dtype != storage.dtype:
        raise NotImplementedError(f"the query is {query.dtype}, the buffer {storage.dtype}")
    b, k, g, h = query.shape
    keys, values = (x.reshape(b * k, -1, 1, h) for x in storage.layer(layer))
    key_end, length = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (key_end, length))
    is_read = (position[:, None, None] < key_end).reshape(b * k, 1, 1, -1)
    # Not 0, of which the library's log-sum-exp is not documented: the slot that is read in its place is masked.
    length = jnp.maximum(length, 1).reshape(-1)
    folded = query.reshape(b * k, 1, g, h)
    folded, keys, values, is_read, length = vary_alike((folded, keys, values, is_read, length))
    out, lse = _call(folded, keys, values, is_read, length, scale)
    lse = lse.reshape(b, k, g)
    nothing = lse < (_NOTHING_FLOAT16 if storage.dtype == jnp.float16 else _NOTHING)
    out = jnp.where(nothing[..., None], 0, out.reshape(query.shape).astype(jnp.float32))
    return out, jnp.where(nothing, -jnp.inf, lse)


def _call(query, keys, values, mask, length, scale: float) -> tuple[jax.Array, jax.Array]:
    """Calls cuDNN for one query per head: ``(out [b, 1, g, h], lse float32 [b, g, 1])``; ``b`` counts KV heads too."""
    try:
        return _library.dot_product_attention(
            query,
            keys,
            values,
            mask=mask,
            q_seqlen=jnp.ones_like(length),
            kv_seqlen=length,
            scale=scale,
            mask_type=_library.MaskType.PADDING,
            return_residual=True,
        )
    except RuntimeError as error:  # there is no cuDNN
        raise NotImplementedError(str(error)) from error
