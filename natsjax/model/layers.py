"""Parts of any transformer: parameters that know their axes, normalization, rotary positions, dropout, the MLP.

Axis letters as in ``natsjax.model.transformer``.
"""

import functools
import math
from collections.abc import Callable

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
    dtype: str = "float32",
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
      dtype: that it is stored in (``model.param_dtype``).
    """
    value = (gain * fan_in**-0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    # The axes of the inputs come first: d of [d, k, g, h], (k, g, h) of [k, g, h, d]; none of a bias or an embedding.
    inputs = next((count for count in range(len(shape)) if math.prod(shape[:count]) == fan_in), 0)
    return nnx.Param(value, axes=axes, part=part, weight_decay=weight_decay, is_wide=False, num_input_axes=inputs)


def vector_param(value: jax.Array, axes: sharding.Axes, part: str, *, is_wide: bool = True) -> nnx.Param:
    """Makes a scale or a bias, without weight decay; arguments as in ``matrix_param``.

    Args:
      value: its initial value, in the dtype that it is stored in.
      axes: names of its axes.
      part: of the model.
      is_wide: True where it is float32 in use, whatever ``model.dtype`` is.
    """
    return nnx.Param(value, axes=axes, part=part, weight_decay=False, is_wide=is_wide, num_input_axes=0)


def gathered(parameter: nnx.Param, dtype: str | jnp.dtype) -> jax.Array:
    """Returns a parameter in the dtype and the layout that it is used in; rounded first, so that less is moved."""
    axes = parameter.get_metadata("axes")
    return sharding.reshard(parameter[...].astype(dtype), *axes)


def residual_gain(model: ModelConfig) -> float:
    """Returns the gain of output projections.

    Under it the residual stream starts with variance of order 1, whatever the depth; 0 with ``zero_init_output``.
    """
    return 0.0 if model.zero_init_output else (2 * model.num_layers) ** -0.5


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


_TURNS = {"yarn": (1.0, 32.0), "llama3": (1.0, 4.0)}
"""Turns in the original context up to which a frequency is divided by s, and from which it stays (``rope_turns``)."""


def scaled_frequencies(frequency: jax.Array, model: ModelConfig) -> jax.Array:
    """Changes the frequencies of the rotary embedding for longer contexts, as ``model.rope_scaling`` says.

    "linear" divides all of them by ``s = rope_scaling_factor``. "yarn" does so where a pair makes at most one turn in
    ``rope_original_context`` tokens, leaves those of 32 turns and more, and goes linearly, in the number of turns, from
    one to the other (arXiv:2309.00071, 3.2); with ``rope_ramp = "pairs"`` in the number of the pair. "llama3" is the
    first of the two between 1 and 4 turns (Llama 3.1, arXiv:2407.21783).

    Args:
      frequency: float32 ``[h/2]``, radians a token.
      model: config.
    """
    if model.rope_scaling == "none":
        return frequency
    if model.rope_scaling == "linear":
        kept = jnp.zeros_like(frequency)
    elif model.rope_ramp == "pairs":
        kept = _kept_by_pair(model)
    else:
        slow, fast = model.rope_turns or _TURNS[model.rope_scaling]
        turns = model.rope_original_context * frequency / (2 * math.pi)
        kept = jnp.clip((turns - slow) / (fast - slow), 0, 1)
    return frequency * (kept + (1 - kept) / model.rope_scaling_factor)


def _kept_by_pair(model: ModelConfig) -> jax.Array:
    """Returns how much of each pair's frequency stays, float32 ``[h/2]``: linear in the pair's number."""
    slow, fast = model.rope_turns or _TURNS[model.rope_scaling]

    def pair_of(turns):  # the number, with a fraction, of the pair that makes so many
        return model.head_dim * math.log(model.rope_original_context / (turns * 2 * math.pi)) / denominator

    denominator = 2 * math.log(model.rope_theta)
    if not denominator:  # all pairs make equally many turns
        return jnp.full((model.head_dim // 2,), float(model.rope_original_context >= fast * 2 * math.pi), jnp.float32)
    # The upper bound is that of YaRN's published code, which takes the number of a dimension for that of a pair.
    first, last = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), model.head_dim - 1)
    width = last - first or 0.001
    return 1 - jnp.clip((jnp.arange(model.head_dim // 2, dtype=jnp.float32) - first) / width, 0, 1)


def rotary_size(model: ModelConfig) -> float:
    """Returns the factor of rotated queries and keys: for YaRN the root of its attention temperature's inverse."""
    if model.rope_scaling != "yarn":
        return 1.0
    return model.rope_attention_factor or 0.1 * math.log(model.rope_scaling_factor) + 1


def rotate(
    x: jax.Array,
    positions: jax.Array,
    base: float,
    *,
    scaled: Callable[[jax.Array], jax.Array] | None = None,
    size: float = 1.0,
) -> jax.Array:
    """Applies the rotary embedding: the pair ``(x[i], x[i + h/2])`` turns by ``position · base^(-2i/h)``.

    Args:
      x: ``[b, t, …, h]``.
      positions: int32 ``[b, t]``.
      base: of the wavelengths.
      scaled: changes the frequencies (``scaled_frequencies``); None: they stay.
      size: factor of the result.

    Source: arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency = frequency if scaled is None else scaled(frequency)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = jnp.expand_dims(angle, tuple(range(2, x.ndim - 1)))
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    sin, cos = (sin, cos) if size == 1 else (size * sin, size * cos)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Sets a fraction of the numbers of activations ``[b, t, d]`` to 0 and divides the others by what is left."""
    # Drawn for the whole batch: every mesh draws the same.
    out_sharding = sharding.compute_sharding("batch", "sequence", None)
    is_kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=out_sharding)
    return jnp.where(is_kept, x / (1 - rate), jnp.zeros_like(x))


_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=False),
}
"""Functions of a gated MLP's gate, by ``model.activation`` (arXiv:2002.05202)."""


class MLP(nnx.Module):
    """The MLP of ``model.activation``: gated, or the square of a ReLU."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        d, f = model.embed_dim, model.mlp_dim
        dtype = model.param_dtype
        self.activation = model.activation
        if self.activation in _GATES:
            self.gate = matrix_param(rngs.params(), (d, f), ("embed", "mlp"), d, "mlp", dtype=dtype)
        self.up = matrix_param(rngs.params(), (d, f), ("embed", "mlp"), d, "mlp", dtype=dtype)
        gain = residual_gain(model)
        self.down = matrix_param(rngs.params(), (f, d), ("mlp", "embed"), f, "mlp", gain=gain, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        if self.activation in _GATES:
            gate, up, down = (gathered(parameter, x.dtype) for parameter in (self.gate, self.up, self.down))
            hidden = _GATES[self.activation](x @ gate) * (x @ up)
        else:
            up, down = (gathered(parameter, x.dtype) for parameter in (self.up, self.down))
            hidden = jnp.square(jax.nn.relu(x @ up))
        out_sharding = sharding.compute_sharding("batch", "sequence", None)
        return jnp.einsum("btf,fd->btd", hidden, down, out_sharding=out_sharding)
