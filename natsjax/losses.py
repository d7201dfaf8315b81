"""The training loss: cross-entropy plus what the kept KV costs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax import token_types
from natsjax.config import Config
from natsjax.model import Inputs, RoleChoice
from natsjax.vocabulary_loss import loss_totals

Batch = dict[str, jax.Array]
"""A batch of ``natsjax.data``: arrays ``[b, t]`` by field."""


BATCH_FIELDS = ("inputs", "targets", "loss_weight", "positions", "document_end")
"""What the step reads of a batch: ``loss_weight`` float32, the others int32."""


class BatchTotals(NamedTuple):
    """What sums over the batch are divided by, float32 scalars: of the data alone, known before the forward pass.

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
      correct: float32 scalar, predicted tokens whose most likely token is right.
      lifetime: float32 ``[l, k]``, key-query pairs.
      role_counts: float32 ``[l, k, 3]``, tokens that are not padding.
    """

    nll: jax.Array
    correct: jax.Array
    lifetime: jax.Array
    role_counts: jax.Array


def batch_totals(batch: Batch) -> BatchTotals:
    """The denominators of a batch."""
    return BatchTotals(
        jnp.sum(batch["loss_weight"]),
        token_types.causal_pairs(batch["positions"], batch["document_end"]),
        jnp.sum(batch["document_end"] > 0, dtype=jnp.float32),
    )


def model_inputs(batch: Batch) -> Inputs:
    """What the model reads of a batch."""
    return Inputs(batch["inputs"], batch["positions"], batch["document_end"])


def loss(
    parameters, structure: nnx.GraphDef, config: Config, batch: Batch, totals: BatchTotals, noise_key, kv_price
) -> tuple[jax.Array, LossSums]:
    """A microbatch's share of ``cross_entropy + kv_price * kv_fraction``; shares add up to the batch's loss.

    Args:
      parameters: nested dict of arrays.
      structure: from ``model.init_parameters``.
      config: of the run.
      batch: a microbatch.
      totals: of the whole batch.
      noise_key: for the roles of this microbatch.
      kv_price: float32 scalar, nats per token per unit of KV fraction.

    Returns:
      ``(loss, sums)``.
    """
    model = nnx.merge(structure, parameters)
    x, roles = model.hidden(model_inputs(batch), RoleChoice(noise_key=noise_key))
    totals_here = loss_totals(x, model.output_weight(), batch["targets"], batch["loss_weight"])
    sums = LossSums(
        nll=totals_here.nll,
        correct=totals_here.correct,
        lifetime=roles.lifetime,
        role_counts=_role_counts(roles.ids, batch["document_end"] > 0),
    )
    share = sums.nll / jnp.maximum(totals.loss_weight, 1)
    if config.model.attention == "nats":
        share += kv_price * kv_fraction(sums.lifetime, totals)
    return share, sums


def kv_fraction(lifetime: jax.Array, totals: BatchTotals) -> jax.Array:
    """Live key-query pairs over causal ones: float32 scalar, in (0, 1]; ``lifetime [l, k]``."""
    return jnp.sum(lifetime) / (totals.causal_pairs * lifetime.size)


def _role_counts(ids: jax.Array, valid: jax.Array) -> jax.Array:
    """float32 ``[l, k, 3]`` from int8 ``[l, b, k, s]`` and bool ``[b, s]``."""
    roles = jnp.arange(token_types.NUM_ROLES, dtype=jnp.int8)
    return jnp.sum((ids[..., None] == roles) & valid[None, :, None, :, None], axis=(1, 3), dtype=jnp.float32)
