"""How the work is cut into tiles: one dataclass per backend, checked, with defaults by shape.

None of it changes what is computed, only how fast and with how much memory.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of the ``xla`` backend.

    Attributes:
      query_block, key_block: rows and columns of a tile (tokens).
      lanes: heads (of batch · KV heads) that go through a tile together and share its list of live blocks; it is
        lowered to the next divisor of their number.
      thresholds: lifetimes (queries), ascending, above which keys are gathered; empty: every key stays in place.
      capacity: slots of the gathered run, as a share of the keys, in (0, 1].
      sampled_run: neighbouring queries that ``Sampled`` draws together.
    """

    query_block: int
    key_block: int
    lanes: int = 1
    thresholds: tuple[int, ...] = ()
    capacity: float = 0.5
    sampled_run: int = 16

    def __post_init__(self):
        for name in ("query_block", "key_block", "lanes", "sampled_run"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tiling({name}={getattr(self, name)}): it must be at least 1.")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"Tiling(capacity={self.capacity}): it must be in (0, 1].")
        if list(self.thresholds) != sorted(set(self.thresholds)) or any(t < 1 for t in self.thresholds):
            raise ValueError(f"Tiling(thresholds={self.thresholds}): ascending lifetimes of at least 1 were expected.")


_MAX_BLOCK = 256
_TILE_PAIRS = 1 << 18  # pairs of a tile over all its lanes: float32 logits of a megabyte


def default_tiling(query: Sequence[int], key: Sequence[int], *, window: int = 0) -> Tiling:
    """The tiling for a shape: blocks that divide the sequences with the least padding, tiles that fit a core's cache.

    Args:
      query: ``(b, t, n, h)``.
      key: ``(b, s, k, h)``.
      window: of SLIDING keys, tokens; 0 where there is none.

    Returns:
      The ``Tiling``; keys are only gathered where there are blocks to skip.
    """
    query_block, key_block = _block(query[1]), _block(key[1])
    group = query[2] // key[2]
    lanes = max(1, _TILE_PAIRS // (group * query_block * key_block))
    gathered = key[1] >= 4 * key_block
    return Tiling(
        query_block=query_block,
        key_block=key_block,
        lanes=lanes,
        thresholds=(max(window + 1, key_block),) if gathered else (),
    )


def _block(length: int) -> int:
    """The largest block of at most ``_MAX_BLOCK`` that divides ``length`` with the least padding."""
    return math.ceil(length / math.ceil(length / _MAX_BLOCK))
