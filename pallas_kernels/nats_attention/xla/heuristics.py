"""Tilings of this backend, which supports every problem."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.nats_attention.tiling import (
    Problem,
    Tiling,
    least_padding,
    lifetime_thresholds,
    one_core_each,
)

PLATFORMS: Sequence[str] = ("cpu", "gpu", "tpu")

# Chosen from what was timed on two cores: docs/attention.md.
_TILE_PAIRS = (
    1 << 18
)  # pairs of a tile over all its lanes: float32 logits of a megabyte, as much as fits into two cores' caches
_TILE_PAIRS_OF_ONE_CORE = 1 << 16
_SHORT = 1024  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaTiling(Tiling):
    """``Tiling``, and how many tiles go through a loop side by side.

    Attributes:
      lanes: pairs of a head (of batch · KV heads) and a query block that take a step together, each with a list of its
        own; heads first, lowered to the next divisor of their number, then neighboring query blocks.
    """

    lanes: int = 1


def default_tiling(problem: Problem) -> XlaTiling:
    """Chooses blocks that divide the sequences with the least padding, as many side by side as fill the cache.

    Where several cores share a device, long sequences want large products (64 rows at a time cost half as much again at
    8k tokens) and short ones small tiles: there the window and the diagonal decide how many pairs a tile wastes. A core
    that has a device to itself wants tiles of 128. Keys are only gathered where there are blocks to skip.
    """
    if problem.keys <= _SHORT:
        return _tiling(problem, 64, 64)
    return _tiling(problem, 128 if one_core_each() else 256, 128)


def candidate_tilings(problem: Problem) -> Sequence[XlaTiling]:
    """Returns tiles of 64 to 512, square or with one side twice the other."""
    blocks = (64, 128, 256, 512)
    pairs = [(q, s) for q in blocks for s in blocks if q <= 2 * s and s <= 2 * q]
    wanted = [_tiling(problem, *pair) for pair in pairs]
    return list(dict.fromkeys(wanted))


def _tiling(problem: Problem, largest_query_block: int, largest_key_block: int) -> XlaTiling:
    query_block = least_padding(problem.queries, largest_query_block)
    key_block = least_padding(problem.keys, largest_key_block)
    pairs = _TILE_PAIRS_OF_ONE_CORE if one_core_each() else _TILE_PAIRS
    return XlaTiling(
        query_block=query_block,
        key_block=key_block,
        lanes=max(1, pairs // (problem.group * query_block * key_block)),
        thresholds=lifetime_thresholds(problem, key_block),
    )


def check(problem: Problem, tiling: Tiling) -> None:
    """Accepts every problem; raises ValueError for a tiling of another backend."""
    del problem
    if not isinstance(tiling, XlaTiling):
        raise ValueError(f"tiling={tiling}: implementation 'xla' takes an XlaTiling.")
