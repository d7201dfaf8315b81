"""The interface of a backend: three passes over tiles, their arguments and results, and a tiling for every problem.

Axis letters: ``b`` batch, ``t`` query, ``s`` key (slot, where keys were rearranged), ``k`` KV head, ``g`` query heads
per KV head, ``h`` head dim.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from pallas_kernels.nats_attention.roles import RoleColumns, RoleSums
from pallas_kernels.nats_attention.tiling import Problem, Tiling


class Intervals(NamedTuple):
    """Who reads whom: query t reads key s when ``key_position[s] <= query_position[t] < key_end[s]``.

    Attributes:
      query_position: int32 ``[b, t]``; ``NO_END`` reads nothing.
      key_position: int32 ``[b, k, s]``.
      key_end: int32 ``[b, k, s]``, exclusive; ``NEVER`` is read by nothing.
    """

    query_position: jax.Array
    key_position: jax.Array
    key_end: jax.Array


class Rows(NamedTuple):
    """The queries of a backward pass.

    Attributes:
      query, dout: ``[b, k, g, t, h]``; in a row that reads nothing they may hold anything.
      lse: float32 ``[b, k, g, t]``, +∞ in a row that reads nothing.
      delta: float32 ``[b, k, g, t]``, ``dout · out`` less the gradient of ``lse``.
    """

    query: jax.Array
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class Backend(Protocol):
    """The passes of a backend; ``differentiable`` combines them. ``check`` refuses unsupported problems.

    Attributes:
      PLATFORMS: the platforms ("cpu", "gpu", "tpu") that it is tried on when no implementation is named.
    """

    PLATFORMS: Sequence[str]

    def default_tiling(self, problem: Problem) -> Tiling:
        """Returns the tiling that is used if the caller gives none."""
        ...

    def candidate_tilings(self, problem: Problem) -> Sequence[Tiling]:
        """Returns the tilings that ``autotune`` tries."""
        ...

    def check(self, problem: Problem, tiling: Any) -> None:
        """Raises NotImplementedError with the reason why a problem cannot be served, ValueError for a wrong tiling."""
        ...

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, scale: float, tiling: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Computes attention over the visible pairs.

        Args:
          query: ``[b, k, g, t, h]``.
          key, value: ``[b, k, s, h]``, in any order.
          intervals: who reads whom.
          scale: of the logits.
          tiling: of the backend.

        Returns:
          ``(out [b, k, g, t, h] in the query's dtype, lse float32 [b, k, g, t])``; 0 and −∞ in a row that reads
          nothing.
        """
        ...

    def visible_pass(
        self,
        rows: Rows,
        key: jax.Array,
        value: jax.Array,
        intervals: Intervals,
        columns: RoleColumns | None,
        scale: float,
        windows: tuple[int, ...],
        tiling: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array, RoleSums | None]:
        """Computes the gradients of query, key and value, and the role sums over visible pairs.

        Args:
          rows: of every query.
          key, value: ``[b, k, s, h]``, in any order.
          intervals: who reads whom.
          columns: of every key, or None for no role sums.
          scale: of the logits.
          windows: of the SLIDING roles, ascending.
          tiling: of the backend.

        Returns:
          ``(dquery [b, k, g, t, h], dkey, dvalue [b, k, s, h], sums)``, 0 for keys that nothing reads; float32, but
          the gradients may come in the dtype of the operands, to which they are rounded in the end.
        """
        ...

    def masked_out_pass(
        self,
        rows: Rows,
        key: jax.Array,
        value: jax.Array,
        intervals: Intervals,
        weight: jax.Array,
        columns: RoleColumns,
        scale: float,
        windows: tuple[int, ...],
        tiling: Any,
    ) -> RoleSums:
        """Computes the role sums over masked-out pairs, which are the credit for longer lifetimes.

        Args:
          rows: of the queries, all of them or a sample, in ascending order.
          key, value: ``[b, k, s, h]``, in any order.
          intervals: who reads whom.
          weight: float32 ``[t]``, how many queries each row stands for.
          columns: of every key.
          scale: of the logits.
          windows: of the SLIDING roles, ascending.
          tiling: of the backend.

        Returns:
          ``RoleSums`` whose ``own`` and ``row`` are 0: these are sums over visible pairs (``row`` may have any length).
        """
        ...
