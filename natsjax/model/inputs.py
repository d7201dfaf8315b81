"""Batches as the model reads them."""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """A batch of packed documents, all int32 ``[b, t]`` (``natsjax.data.packing`` has the details).

    Attributes:
      tokens: ids.
      positions: distance to the start of the document piece.
      document_end: index at which the piece ends, exclusive; 0 marks padding.
    """

    tokens: jax.Array
    positions: jax.Array
    document_end: jax.Array


Batch = dict[str, jax.Array]
"""A batch of ``natsjax.data``: arrays ``[b, t]`` by field."""


BATCH_FIELDS = ("inputs", "targets", "loss_weight", "positions", "document_end")
"""What the step reads of a batch: ``loss_weight`` float32, the others int32."""


def model_inputs(batch: Batch) -> Inputs:
    """What the model reads of a batch."""
    return Inputs(batch["inputs"], batch["positions"], batch["document_end"])
