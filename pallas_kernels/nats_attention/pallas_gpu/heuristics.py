"""Tilings of this backend, and the problems that it supports: bfloat16 and float16 on Hopper."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.nats_attention.tiling import Problem, Tiling

PLATFORMS: Sequence[str] = ("gpu",)
BLOCK = 128
"""Rows and columns of a tile as the lists count them: two warpgroups with the 64 rows of a matrix product each."""

_OLDEST_JAX = (0, 11)
_DTYPES = ("bfloat16", "float16")
_HEAD_DIMS = (64, 128)
_WIDTHS = (64, 128)
_SHARED_MEMORY = 227 << 10  # bytes that a block of threads may have on Hopper
_SMALL_BUFFERS = 8 << 10  # of these, what barriers, vectors and reductions may take
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiling(Tiling):
    """``Tiling`` of 128×128 blocks, how far copies run ahead, and whether the kernels are interpreted.

    Attributes:
      columns: keys that the forward pass takes at once, 64 or 128; the visible pass, which holds more in registers,
        takes 64.
      rows: queries that the masked-out pass takes at once, 64 or 128.
      stages: blocks in shared memory, those that are computed and those on their way; twice as many halves of them.
      interpret: runs the kernels in Pallas' GPU interpreter on any platform, slowly: for tests. The interpreter knows
        no product with its left operand in registers, so that operand then goes through shared memory.
    """

    query_block: int = BLOCK
    key_block: int = BLOCK
    columns: int = 128
    rows: int = 128
    stages: int = 2
    interpret: bool = False

    def slots(self, width: int) -> int:
        """Returns the number of tiles of ``width`` tokens in shared memory."""
        return self.stages * BLOCK // width


def default_tiling(problem: Problem) -> GpuTiling:
    """Chooses wide tiles, as many as fit. Keys are gathered only if there are blocks to skip."""
    return _tiling(problem, columns=128, rows=128, stages=2 if problem.head_dim > 64 else 4)


def candidate_tilings(problem: Problem) -> Sequence[GpuTiling]:
    """Returns narrow and wide tiles, with as many in shared memory as may help."""
    wanted = [_tiling(problem, *numbers) for numbers in itertools.product(_WIDTHS, _WIDTHS, (2, 3, 4))]
    return [x for x in wanted if shared_memory(problem.head_dim, x) <= _SHARED_MEMORY]


def _tiling(problem: Problem, columns: int, rows: int, stages: int) -> GpuTiling:
    gathered = problem.keys >= 4 * BLOCK
    return GpuTiling(
        columns=columns, rows=rows, stages=stages, thresholds=(max(problem.window + 1, BLOCK),) if gathered else ()
    )


def shared_memory(head_dim: int, tiling: GpuTiling) -> int:
    """Returns the bytes of the widest kernel: two resident tiles of 16 bits and two streamed ones in every stage."""
    return 2 * 2 * (BLOCK + tiling.stages * BLOCK) * head_dim + _SMALL_BUFFERS


def check(problem: Problem, tiling: Any) -> None:
    """Raises NotImplementedError with the reason why a problem cannot be served, ValueError for a wrong tiling."""
    if jax.__version_info__[:2] < _OLDEST_JAX:
        raise NotImplementedError(f"needs jax >= {'.'.join(map(str, _OLDEST_JAX))}; this is {jax.__version__}")
    if problem.dtype not in _DTYPES:
        raise NotImplementedError(f"{problem.dtype} is not a dtype of Hopper's matrix products; {_list(_DTYPES)} are")
    if problem.head_dim not in _HEAD_DIMS:
        raise NotImplementedError(f"head dim {problem.head_dim} is not one of {_list(_HEAD_DIMS)}")
    if not isinstance(tiling, GpuTiling):
        raise ValueError(f"tiling={tiling}: implementation 'pallas_gpu' takes a GpuTiling.")
    for name, allowed in (("query_block", (BLOCK,)), ("key_block", (BLOCK,)), ("columns", _WIDTHS), ("rows", _WIDTHS)):
        if getattr(tiling, name) not in allowed:
            raise ValueError(f"GpuTiling({name}={getattr(tiling, name)}): {_list(allowed, 'or')} was expected.")
    if shared_memory(problem.head_dim, tiling) > _SHARED_MEMORY:
        raise ValueError(
            f"GpuTiling(stages={tiling.stages}): at head dim {problem.head_dim} these take more than "
            f"{_SHARED_MEMORY >> 10} KiB of shared memory; fewer were expected."
        )
    if not tiling.interpret:
        _check_device()


def _list(values: Sequence, word: str = "and") -> str:
    return f" {word} ".join(map(str, values))


def _check_device() -> None:
    """Refuses a device that is not Hopper: the mesh's, which compilation ahead of time sets, or else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        # An abstract device has a name, but no compute capability.
        if not _HOPPER.search(device.device_kind):
            raise NotImplementedError(f"{device.device_kind} is not a Hopper GPU (H100, H200, …)")
        return
    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    if capability != "9.0":
        raise NotImplementedError(
            f"{first.device_kind} has compute capability {capability}; Hopper (9.0) is needed, or "
            "GpuTiling(interpret=True)"
        )
