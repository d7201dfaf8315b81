"""Parts of any transformer: parameters that know their axes, normalization, rotary positions, the MLP.

Axis letters as in ``natsjax.model.transformer``.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.config import ModelConfig
from natsjax.model import sharding


def matrix_param(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: sharding.Axes,
    fan_in: int,
    part: str,
    *,
    gain: float = 1.0,
    weight_decay: bool = True,
) -> nnx.Param:
    """Makes a weight of standard deviation ``gain / sqrt(fan_in)``.

    Args:
      key: PRNG key.
      shape: of the weight.
      axes: names of its axes without the layers', for the mesh.
      fan_in: inputs that are summed.
      part: one of ``parameters.PARTS``, for norms by part and the scorer's own learning rate.
      gain: factor of the standard deviation.
      weight_decay: True where the optimizer decays it.
    """
    value = gain * fan_in**-0.5 * jax.random.normal(key, shape, jnp.float32)
    # The axes of the inputs come first: d of [d, k, g, h], (k, g, h) of [k, g, h, d]; none of a bias or an embedding.
    inputs = next((count for count in range(len(shape)) if math.prod(shape[:count]) == fan_in), 0)
    return nnx.Param(value, axes=axes, part=part, weight_decay=weight_decay, num_input_axes=inputs)


def vector_param(value: jax.Array, axes: sharding.Axes, part: str) -> nnx.Param:
    """Makes a scale or a bias, without weight decay; arguments as in ``matrix_param``."""
    return nnx.Param(value, axes=axes, part=part, weight_decay=False, num_input_axes=0)


def gathered(parameter: nnx.Param, dtype: str | jnp.dtype) -> jax.Array:
    """Returns a parameter in the dtype and the layout that it is used in; rounded first, so that less is moved."""
    axes = parameter.get_metadata("axes")
    return sharding.reshard(parameter[...].astype(dtype), *axes)


def residual_gain(model: ModelConfig) -> float:
    """Returns the gain under which the residual stream starts with variance of order 1, whatever the depth."""
    return (2 * model.num_layers) ** -0.5


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned scale, in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = vector_param(jnp.ones((width,), jnp.float32), (None,), "norm")
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``[…, d]``; the result has the dtype of ``x``."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...]).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Applies the rotary embedding: the pair ``(x[i], x[i + h/2])`` turns by ``position · base^(-2i/h)``.

    Args:
      x: ``[b, t, …, h]``.
      positions: int32 ``[b, t]``.
      base: of the wavelengths.

    Source: arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = jnp.expand_dims(angle, tuple(range(2, x.ndim - 1)))
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        d, f = model.embed_dim, model.mlp_dim
        self.gate = matrix_param(rngs.params(), (d, f), ("embed", "mlp"), d, "mlp")
        self.up = matrix_param(rngs.params(), (d, f), ("embed", "mlp"), d, "mlp")
        self.down = matrix_param(rngs.params(), (f, d), ("mlp", "embed"), f, "mlp", gain=residual_gain(model))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        gate, up, down = (gathered(parameter, x.dtype) for parameter in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(x @ gate) * (x @ up)
        out_sharding = sharding.compute_sharding("batch", "sequence", None)
        return jnp.einsum("btf,fd->btd", hidden, down, out_sharding=out_sharding)
