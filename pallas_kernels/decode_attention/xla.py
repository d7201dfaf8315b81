"""Plain JAX, for every platform and format: one softmax carried over the occupied blocks, all heads side by side.

On a CPU a product of all heads with a block reads memory as fast as it comes; products of one head after the other,
each over its own prefix, reach half of that. So the loop ends with the longest prefix of the layer's heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.storage import FORMATS, Format, Storage
from pallas_kernels.manual_axes import vary_like

PLATFORMS: Sequence[str] = ("cpu", "gpu", "tpu")
READS: Sequence[Format] = FORMATS

# No logit is lower, and it is finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def check(storage: Storage) -> None:
    """Accepts every call."""


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
    u = storage.block_size
    length = jax.lax.dynamic_index_in_dim(length, layer, 0, keepdims=False)
    number = jax.lax.div(jnp.max(length) + u - 1, u)
    query = scale * query.astype(jnp.float32)

    def step(j, carry):
        top, total, acc = carry
        keys, values = (x.astype(jnp.float32) for x in storage.block(layer, j))
        end = jax.lax.dynamic_slice(key_end, (layer, 0, 0, j * u), (1, *key_end.shape[1:3], u))[0]
        logits = jnp.einsum("bkgh,bkhu->bkgu", query, keys, precision=jax.lax.Precision.HIGHEST)
        logits = jnp.where((position[:, None, None] < end)[:, :, None], logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_top[..., None])
        decay = jnp.exp(top - new_top)
        update = jnp.einsum("bkgu,bkuh->bkgh", weights, values, precision=jax.lax.Precision.HIGHEST)
        return new_top, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + update

    rows = query.shape[:3]
    carry = (jnp.full(rows, _LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(query.shape, jnp.float32))
    carry = vary_like(carry, (query, storage, key_end, length, position))
    top, total, acc = jax.lax.fori_loop(0, number, step, carry)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    return out, jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
