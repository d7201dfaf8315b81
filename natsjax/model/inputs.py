"""The batch that the model reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natsjax.model import sharding


class Batch(NamedTuple):
    """Packed documents, arrays ``[b, t]``; ``natsjax.data`` names the fields of its rows alike.

    Attributes:
      inputs: int32, token ids.
      positions: int32, distance to the start of the document piece.
      document_end: int32, index at which the piece ends, exclusive; 0 marks padding.
      targets: int32, the tokens to predict; None where nothing is predicted.
      loss_weight: float32, weight of each prediction in the loss; None where there is no loss.
    """

    inputs: jax.Array
    positions: jax.Array
    document_end: jax.Array
    targets: Any = None
    loss_weight: Any = None

    @classmethod
    def from_rows(cls, rows: Mapping[str, Any]) -> "Batch":
        """Takes the fields that there are out of rows of data, which may have others."""
        return cls(**{name: rows[name] for name in cls._fields if name in rows})

    @property
    def is_token(self) -> jax.Array:
        """Bool: False at padding."""
        return self.document_end > 0

    @property
    def is_first(self) -> jax.Array:
        """Bool: the first token of each document, which is always GLOBAL; padding counts as first too."""
        return self.positions == 0

    @property
    def previous(self) -> jax.Array:
        """int32: the token before each in its document, -1 where there is none."""
        # The ids are moved, not their embeddings: a device's first one may be another device's last.
        whole = sharding.reshard(self.inputs, "batch", None)
        shifted = sharding.reshard(jnp.pad(whole[:, :-1], ((0, 0), (1, 0))), "batch", "sequence")
        return jnp.where(self.is_first, -1, shifted)

    @property
    def causal_pairs(self) -> jax.Array:
        """Key-query pairs of full attention per KV head, float32: the sum of ``n (n + 1) / 2`` over documents."""
        return jnp.sum(jnp.where(self.is_token, self.positions + 1, 0), dtype=jnp.float32)
