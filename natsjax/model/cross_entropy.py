"""Cross-entropy over a vocabulary that is divided among devices, without the logits of all tokens at once.

The output layer's product, the softmax and their gradients go through the tokens in chunks; what is kept is a number
for each token. For the gradient the chunk's logits are used while they are there (nothing is computed twice), which is
possible because the loss is a plain weighted sum.

Axis letters: ``b`` batch, ``t`` token, ``d`` embedding dim, ``v`` vocabulary; ``n`` tokens of a device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natsjax.model import sharding

_CHUNK_BYTES = 1 << 25
"""Size of a chunk's float32 logits on a device, about; but see below."""

_LEAST_TOKENS = 1024
"""In a chunk. A chunk reads the output layer twice and its gradient once, and writes the latter: 12 bytes an entry for
6 operations a token. With fewer tokens an accelerator waits for its memory (``python -m natsjax.plan`` tells)."""


class TokenLosses(NamedTuple):
    """Losses of each token, ``[b, t]``.

    Attributes:
      nll: float32, negative log-likelihood of the target, nats.
      correct: bool, the most likely token is the target (of equal ones, the first).
    """

    nll: jax.Array
    correct: jax.Array


class LossTotals(NamedTuple):
    """Weighted sums over tokens, float32 scalars.

    Attributes:
      loss: ``nll`` and ``z_loss`` times its weight; the only one that is differentiable.
      nll: nats.
      z_loss: squares of the logarithm of the softmax's denominator.
      correct: tokens.
    """

    loss: jax.Array
    nll: jax.Array
    z_loss: jax.Array
    correct: jax.Array


def capped(logits: jax.Array, softcap: float) -> jax.Array:
    """Caps logits: ``softcap * tanh(logits / softcap)`` (arXiv:2408.00118); 0 leaves them as they are."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


_X: sharding.Axes = ("batch", "sequence", None)
_TOKEN: sharding.Axes = ("batch", "sequence")
_WEIGHT: sharding.Axes = ("vocab", None)


def token_losses(x: jax.Array, output_weight: jax.Array, targets: jax.Array, *, softcap: float = 0.0) -> TokenLosses:
    """Computes the loss of each token's prediction; not meant to be differentiated.

    Args:
      x: ``[b, t, d]``, input of the output layer.
      output_weight: ``[v, d]``, in the dtype of ``x``.
      targets: int32 ``[b, t]``.
      softcap: of the logits (``capped``).

    Returns:
      ``TokenLosses``.
    """

    def local(x, weight, targets):
        step = functools.partial(_losses, softcap, weight)
        _, (nll, _, correct) = _by_chunk(step, None, len(weight), _flat(x), targets.reshape(-1))
        return nll.reshape(targets.shape), correct.reshape(targets.shape)

    return TokenLosses(*sharding.shard_map(local, (_X, _WEIGHT, _TOKEN), [_TOKEN, _TOKEN])(x, output_weight, targets))


def loss_totals(
    x: jax.Array,
    output_weight: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> LossTotals:
    """Sums losses over all tokens; ``loss`` is differentiable in ``x`` and ``output_weight``.

    Args:
      x: ``[b, t, d]``, input of the output layer.
      output_weight: ``[v, d]``, in the dtype of ``x``.
      targets: int32 ``[b, t]``.
      weight: float32 ``[b, t]``, of each token.
      softcap: of the logits (``capped``).
      z_loss: weight of the squared logarithm of the softmax's denominator (arXiv:2204.02311).

    Returns:
      ``LossTotals``.
    """

    def local(x, output_weight, targets, weight):
        # Each device adds its part to the gradients of arrays that it has in common with others.
        x, output_weight = (_vary(y) for y in (x, output_weight))
        totals = _weighted(softcap, z_loss, _flat(x), output_weight, targets.reshape(-1), weight.reshape(-1))
        return tuple(sharding.psum(total, "batch", "sequence") for total in totals)

    totals = sharding.shard_map(local, (_X, _WEIGHT, _TOKEN, _TOKEN), [()] * 4)
    return LossTotals(*totals(x, output_weight, targets, weight))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _vary(x: jax.Array) -> jax.Array:
    """Marks ``x`` as different on every device that takes part."""
    axes = [axis for name in ("batch", "sequence", "vocab") for axis in sharding.mesh_axes(name)]
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(softcap, z_loss, x, output_weight, targets, weight):
    """Computes ``LossTotals`` of ``x [n, d]``, as a tuple."""
    step = functools.partial(_losses, softcap, output_weight)
    _, of_token = _by_chunk(step, None, len(output_weight), x, targets)
    return _totals(z_loss, weight, *of_token)


def _totals(z_loss, weight, nll, log_total, correct):
    nll, z, correct = (jnp.sum(weight * each) for each in (nll, jnp.square(log_total), correct))
    return (nll + z_loss * z if z_loss else nll), nll, z, correct


def _weighted_fwd(softcap, z_loss, x, output_weight, targets, weight):
    step = functools.partial(_losses_and_gradients, softcap, z_loss, output_weight)
    start = _vary(jnp.zeros(output_weight.shape, jnp.float32))
    dweight, (*of_token, dx) = _by_chunk(step, start, len(output_weight), x, targets, weight)
    return _totals(z_loss, weight, *of_token), (dx, dweight.astype(output_weight.dtype))


def _weighted_bwd(softcap, z_loss, residuals, cotangents):
    dx, dweight = residuals
    dloss = cotangents[0]
    return (dx * dloss).astype(dx.dtype), (dweight * dloss).astype(dweight.dtype), None, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd)


class _Softmax(NamedTuple):
    """Softmax of a chunk's logits; ``exp`` is for this device's part of the vocabulary, the others are for all of it.

    Attributes:
      logits: float32 ``[n, v]``, capped.
      exp: float32 ``[n, v]``, ``exp(logit - max)``.
      total: float32 ``[n]``, its sum.
      log_total: float32 ``[n]``, the logarithm of the sum of ``exp(logit)``.
      nll: float32 ``[n]``.
      correct: bool ``[n]``.
      is_target: bool ``[n, v]``.
    """

    logits: jax.Array
    exp: jax.Array
    total: jax.Array
    log_total: jax.Array
    nll: jax.Array
    correct: jax.Array
    is_target: jax.Array


def _softmax(softcap, x, output_weight, targets) -> _Softmax:
    axes = sharding.mesh_axes("vocab")
    logits = capped(jnp.einsum("nd,vd->nv", x, output_weight, preferred_element_type=jnp.float32), softcap)
    size = logits.shape[-1]
    ids = jnp.arange(size, dtype=jnp.int32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    largest = jnp.max(logits, axis=-1)
    if axes:
        first = jax.lax.axis_index(axes) * size
        ids += first
        mine, largest = largest, jax.lax.pmax(largest, axes)
        best = jax.lax.pmin(jnp.where(mine == largest, best + first, jnp.iinfo(jnp.int32).max), axes)
    exp = jnp.exp(logits - largest[:, None])
    is_target = ids == targets[:, None]
    total = jnp.sum(exp, axis=-1)
    chosen = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    if axes:
        total, chosen = jax.lax.psum((total, chosen), axes)
    log_total = jnp.log(total) + largest
    return _Softmax(logits, exp, total, log_total, log_total - chosen, best == targets, is_target)


def _losses(softcap, output_weight, carry, x, targets):
    softmax = _softmax(softcap, x, output_weight, targets)
    return carry, (softmax.nll, softmax.log_total, softmax.correct)


def _losses_and_gradients(softcap, z_loss, output_weight, carry, x, targets, weight):
    """Computes ``dx [n, d]`` too, this device's part, and adds the gradient of the output layer to the carry."""
    softmax = _softmax(softcap, x, output_weight, targets)
    probability = softmax.exp / softmax.total[:, None]
    dlogits = probability - softmax.is_target
    if z_loss:
        dlogits += 2 * z_loss * softmax.log_total[:, None] * probability
    if softcap:
        dlogits *= 1 - jnp.square(softmax.logits / softcap)  # of tanh
    dlogits *= weight[:, None]
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.einsum("nv,vd->nd", dlogits, output_weight)
    carry += jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)
    return carry, (softmax.nll, softmax.log_total, softmax.correct, dx)


def _by_chunk(step: Callable, carry: Any, vocab_size: int, *of_token: jax.Array) -> tuple[Any, Any]:
    """Runs ``step(carry, *chunk) → (carry, results)`` over chunks of tokens; a short last one is padded with 0.

    Args:
      step: on arrays ``[c, …]``.
      carry: the first one.
      vocab_size: of this device's part, from which the length of chunks follows.
      of_token: arrays ``[n, …]``.

    Returns:
      The last carry, and the results joined, ``[n, …]``.
    """
    count = of_token[0].shape[0]
    chunks = max(1, -(-count // max(_LEAST_TOKENS, _CHUNK_BYTES // (4 * vocab_size))))
    if chunks == 1:
        return step(carry, *of_token)
    size = -(-count // chunks)
    padded = (jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1)) for x in of_token)
    parts = [x.reshape(chunks, size, *x.shape[1:]) for x in padded]
    carry, results = jax.lax.scan(lambda carry, part: step(carry, *part), carry, parts)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)
