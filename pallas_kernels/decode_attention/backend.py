"""The interface of a backend of decode attention.

Axis letters: ``l`` layer, ``b`` batch, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim, ``c`` slot.
"""

from collections.abc import Sequence
from typing import Protocol

import jax

from pallas_kernels.decode_attention.storage import Format, Storage


class Backend(Protocol):
    """One token of each sequence against the slots of one layer.

    Attributes:
      PLATFORMS: the platforms ("cpu", "gpu", "tpu") that it is tried on when no implementation is named.
      READS: the formats that it reads; a buffer for its platform takes the first.
    """

    PLATFORMS: Sequence[str]
    READS: Sequence[Format]

    def check(self, storage: Storage) -> None:
        """Raises NotImplementedError with the reason why a buffer cannot be served."""
        ...

    def attend(
        self,
        query: jax.Array,
        storage: Storage,
        key_end: jax.Array,
        length: jax.Array,
        position: jax.Array,
        layer: jax.Array,
        scale: float,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes attention over the slots ``[0, length)`` of a layer that are not yet free.

        Args:
          query: ``[b, k, g, h]``.
          storage: of all layers of a group; only blocks that hold slots below ``length`` should be read.
          key_end: int32 ``[l, b, k, c]``: a slot is read when ``position < key_end``.
          length: int32 ``[l, b, k]``.
          position: int32 ``[b]``, of the queries.
          layer: int32 scalar.
          scale: of the logits.

        Returns:
          ``(out float32 [b, k, g, h], lse float32 [b, k, g])``; 0 and −∞ where nothing is read.
        """
        ...
