"""The dense oracle that tests compare with, never a fallback."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.storage import FORMATS, Format, Storage

PLATFORMS: Sequence[str] = ()
READS: Sequence[Format] = FORMATS


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
    """Computes attention over the slots: see ``backend.Backend``; in float64 if the query is."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    keys, values = (x.astype(dtype) for x in storage.layer(layer))
    is_read = position[:, None, None] < key_end[layer]
    logits = scale * jnp.einsum("bkgh,bkch->bkgc", query.astype(dtype), keys)
    logits = jnp.where(is_read[:, :, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(jnp.isfinite(lse)[..., None], jnp.exp(logits - lse[..., None]), 0)
    return jnp.einsum("bkgc,bkch->bkgh", jnp.nan_to_num(weights), values), lse
