"""Tilings of this backend, and the problems that it supports."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.nats_attention.pallas_tpu.packing import Geometry
from pallas_kernels.nats_attention.tiling import Problem, Tiling
from pallas_kernels.tpu_lanes import LANES, VMEM_LIMIT

PLATFORMS: Sequence[str] = ("tpu",)

_DTYPES = {"bfloat16": 2, "float32": 4}
_LARGEST_HEAD_DIM = 256
_ROWS = 1024  # of a tile, all heads of a group together: the float32 logits beside 256 keys are a megabyte


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiling(Tiling):
    """``Tiling`` with blocks that are multiples of 128, and whether the kernels are interpreted.

    Attributes:
      interpret: False compiles the kernels, which takes a TPU (or compilation ahead of time for one). True runs them
        in Pallas' interpreter on any platform, slowly: for tests. A ``pltpu.InterpretParams`` also emulates the
        copies and semaphores of a TPU.
    """

    interpret: Any = False


def default_tiling(problem: Problem) -> TpuTiling:
    """Chooses up to 1024 rows by 256 keys a tile. Keys are gathered only if there are blocks to skip."""
    rows = _ROWS // problem.group
    query_block = 256 if rows >= 256 else 128
    key_block = 256 if problem.group * query_block <= _ROWS else 128
    return _tiling(problem, query_block, key_block)


def candidate_tilings(problem: Problem) -> Sequence[TpuTiling]:
    """Returns tiles of 128 to 512 each way that fit into vector memory."""
    blocks = (128, 256, 512)
    wanted = [_tiling(problem, q, s) for q in blocks for s in blocks]
    return [x for x in dict.fromkeys(wanted) if vmem_bytes(problem, x) <= VMEM_LIMIT]


def _tiling(problem: Problem, query_block: int, key_block: int) -> TpuTiling:
    query_block = min(query_block, _whole_lanes(problem.queries))
    key_block = min(key_block, _whole_lanes(problem.keys))
    gathered = problem.keys >= 4 * key_block
    return TpuTiling(
        query_block=query_block,
        key_block=key_block,
        thresholds=(max(problem.window + 1, key_block),) if gathered else (),
    )


def _whole_lanes(length: int) -> int:
    return -(-length // LANES) * LANES


def vmem_bytes(problem: Problem, tiling: Tiling) -> int:
    """Returns the bytes of the widest kernel: six tiles of float32, four blocks of either side, two accumulators."""
    geometry = Geometry.of(problem.group, problem.head_dim, tiling)
    pairs = geometry.rows * tiling.key_block
    tokens = geometry.rows + tiling.key_block
    itemsize = _DTYPES.get(problem.dtype, 4)
    return 6 * 4 * pairs + tokens * geometry.width * (4 * itemsize + 2 * 4)


def check(problem: Problem, tiling: Any) -> None:
    """Raises NotImplementedError with the reason why a problem cannot be served, ValueError for a wrong tiling."""
    if problem.dtype not in _DTYPES:
        raise NotImplementedError(f"{problem.dtype} is not a dtype of its kernels; bfloat16 and float32 are")
    if problem.head_dim > _LARGEST_HEAD_DIM:
        raise NotImplementedError(f"head dim {problem.head_dim} is above {_LARGEST_HEAD_DIM}")
    least = TpuTiling(query_block=LANES, key_block=LANES)
    if vmem_bytes(problem, least) > VMEM_LIMIT:
        raise NotImplementedError(f"{problem.group} query heads per KV head do not fit into vector memory")
    if not isinstance(tiling, TpuTiling):
        raise ValueError(f"tiling={tiling}: implementation 'pallas_tpu' takes a TpuTiling.")
    for name in ("query_block", "key_block"):
        if getattr(tiling, name) % LANES:
            raise ValueError(f"TpuTiling({name}={getattr(tiling, name)}): a multiple of {LANES} was expected.")
    if vmem_bytes(problem, tiling) > VMEM_LIMIT:
        raise ValueError(
            f"TpuTiling(query_block={tiling.query_block}, key_block={tiling.key_block}): with {problem.group} query "
            f"heads per KV head that takes over {VMEM_LIMIT >> 20} MiB of vector memory; smaller blocks were expected."
        )
