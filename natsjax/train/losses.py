"""The training loss: cross-entropy, a z-loss where one is asked for, and the KV penalty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.config import Config
from natsjax.model.attention import RoleSampling
from natsjax.model.cross_entropy import loss_totals
from natsjax.model.inputs import Batch
from natsjax.train.role_statistics import RoleSums, role_sums


class BatchTotals(NamedTuple):
    """Denominators of sums over a batch, float32 scalars: of the data alone, known before the forward pass.

    Attributes:
      loss_weight: tokens that are predicted.
      causal_pairs: key-query pairs of full attention, per layer and KV head.
      tokens: tokens that are not padding.
    """

    loss_weight: jax.Array
    causal_pairs: jax.Array
    tokens: jax.Array


class LossSums(NamedTuple):
    """Sums over a batch, or over one of its microbatches; they add up.

    Attributes:
      nll: float32 scalar, negative log-likelihood of the predicted tokens, nats.
      z_loss: float32 scalar, squared logarithms of their softmaxes' denominators.
      correct: float32 scalar, predicted tokens whose most likely token is right.
      lifetime: float32 ``[l, k]``, key-query pairs.
      entropy: float32 ``[l, k]``, of the scorer's softmax, over tokens that are not padding, nats.
      forced: float32 scalar, first tokens of documents.
      roles: ``role_statistics.RoleSums``.
    """

    nll: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    lifetime: jax.Array
    entropy: jax.Array
    forced: jax.Array
    roles: RoleSums


def batch_totals(batch: Batch) -> BatchTotals:
    """Computes the denominators of a batch."""
    tokens = jnp.sum(batch.is_token, dtype=jnp.float32)
    return BatchTotals(jnp.sum(batch.loss_weight), batch.causal_pairs, tokens)


def loss(
    parameters,
    structure: nnx.GraphDef,
    config: Config,
    batch: Batch,
    totals: BatchTotals,
    noise_key,
    kv_penalty,
    temperature=None,
    noise=None,
) -> tuple[jax.Array, LossSums]:
    """Computes a microbatch's part of ``cross_entropy + z_loss + kv_penalty * kv_fraction``; parts add up to the loss.

    Args:
      parameters: nested dict of arrays.
      structure: from ``model.init_parameters``.
      config: of the run.
      batch: a microbatch.
      totals: of the whole batch.
      noise_key: for the roles of this microbatch, and ``model.dropout``.
      kv_penalty: float32 scalar, nats per token per unit of KV fraction.
      temperature: float32 scalar, of the straight-through softmax; None: ``nats.temperature``.
      noise: float32 scalar, scale of the Gumbel noise; None: 1.

    Returns:
      ``(loss, sums)``.
    """
    model = nnx.merge(structure, parameters)
    sampling = RoleSampling(noise_key=noise_key, temperature=temperature, noise=noise)
    x, roles = model.hidden(batch, sampling, is_training=True)
    predicted = loss_totals(
        x,
        model.output_weight(),
        batch.targets,
        batch.loss_weight,
        softcap=config.model.final_logit_softcap,
        z_loss=config.loss.z_loss,
    )
    sums = LossSums(
        nll=predicted.nll,
        z_loss=predicted.z_loss,
        correct=predicted.correct,
        lifetime=roles.lifetime,
        entropy=roles.entropy,
        forced=jnp.sum(batch.is_first & batch.is_token, dtype=jnp.float32),
        roles=role_sums(roles.ids, batch, config),
    )
    part = predicted.loss / jnp.maximum(totals.loss_weight, 1)
    if config.model.has_roles:
        part += kv_penalty * kv_fraction(sums.lifetime, totals)
    return part, sums


def kv_fraction(lifetime: jax.Array, totals: BatchTotals) -> jax.Array:
    """Returns live key-query pairs over causal ones: float32 scalar, in (0, 1]; ``lifetime [l, k]``."""
    return jnp.sum(lifetime) / (totals.causal_pairs * lifetime.size)
