"""Tilings of this backend, and what it serves: everything."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.nats_attention.tiling import Problem, Tiling, least_padding, lifetime_thresholds

PLATFORMS: Sequence[str] = ("cpu", "gpu", "tpu")

_TILE_PAIRS = 1 << 18  # pairs of a tile over all its lanes: float32 logits of a megabyte, a core's share of the cache
_SHORT = 1024  # tokens; what autotune found on two cores: docs/attention.md


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaTiling(Tiling):
    """``Tiling``, and how many heads share a tile.

    Attributes:
      lanes: heads (of batch · KV heads) that go through a tile together and share its list of live blocks; it is
        lowered to the next divisor of their number.
    """

    lanes: int = 1


def default_tiling(problem: Problem) -> XlaTiling:
    """Blocks that divide the sequences with the least padding, as many side by side as fill a core's cache.

    Long sequences want large products (64 rows at a time cost half as much again at 8k tokens), short ones small tiles:
    there the window and the diagonal decide how many pairs a tile wastes. Keys are only gathered where there are blocks
    to skip.
    """
    return _tiling(problem, 256, 128) if problem.keys > _SHORT else _tiling(problem, 64)


def candidate_tilings(problem: Problem) -> Sequence[XlaTiling]:
    """Tiles of 64 to 512, square and twice as wide as high or as high as wide."""
    blocks = (64, 128, 256, 512)
    pairs = [(q, s) for q in blocks for s in blocks if q <= 2 * s and s <= 2 * q]
    wanted = [_tiling(problem, q, s) for q, s in pairs]
    return list(dict.fromkeys(wanted))


def _tiling(problem: Problem, largest_query_block: int, largest_key_block: int | None = None) -> XlaTiling:
    query_block = least_padding(problem.queries, largest_query_block)
    key_block = least_padding(problem.keys, largest_key_block or largest_query_block)
    return XlaTiling(
        query_block=query_block,
        key_block=key_block,
        lanes=max(1, _TILE_PAIRS // (problem.group * query_block * key_block)),
        thresholds=lifetime_thresholds(problem, key_block),
    )


def check(problem: Problem, tiling: Tiling) -> None:
    """Every problem is served; the tiling must be this backend's."""
    del problem
    if not isinstance(tiling, XlaTiling):
        raise ValueError(f"tiling={tiling}: implementation 'xla' takes an XlaTiling.")
