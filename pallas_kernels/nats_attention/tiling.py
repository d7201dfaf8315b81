"""The division of the work into tiles: fields and checks that all backends share.

It changes time and memory, not results, except for ``sampled_run``, the queries that ``Sampled`` samples together. A
backend may add fields of its own in a subclass of ``Tiling``, and has defaults for every shape; ``autotune`` times
candidates on the device.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import jax


class Problem(NamedTuple):
    """The sizes that a tiling is chosen for.

    Attributes:
      batch: sequences.
      queries, keys: tokens a sequence.
      num_kv_heads: KV heads.
      group: query heads per KV head.
      head_dim: of query, key and value.
      window: the longest one of SLIDING keys, tokens; 0 where there are no roles.
      dtype: name of the dtype of query, key and value.
    """

    batch: int
    queries: int
    keys: int
    num_kv_heads: int
    group: int
    head_dim: int
    window: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of attention and what goes into the gathered run.

    Attributes:
      query_block, key_block: rows (of each query head) and columns of a tile, tokens.
      thresholds: lifetimes (queries), ascending, above which keys are gathered; empty: every key stays in place.
      capacity: slots of the gathered run, as a fraction of the keys, in (0, 1].
      sampled_run: neighboring queries that ``Sampled`` samples together.
    """

    query_block: int
    key_block: int
    thresholds: tuple[int, ...] = ()
    capacity: float = 0.5
    sampled_run: int = 16

    def __post_init__(self):
        kind = type(self).__name__
        for field in dataclasses.fields(self):
            number = getattr(self, field.name)
            if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                raise ValueError(f"{kind}({field.name}={number}): it must be at least 1.")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"{kind}(capacity={self.capacity}): it must be in (0, 1].")
        if list(self.thresholds) != sorted(set(self.thresholds)) or any(t < 1 for t in self.thresholds):
            raise ValueError(f"{kind}(thresholds={self.thresholds}): ascending lifetimes of at least 1 were expected.")


def lifetime_thresholds(problem: Problem, key_block: int) -> tuple[int, ...]:
    """Returns ``Tiling.thresholds`` for a problem: above the window and a block; none if few blocks can be skipped."""
    return (max(problem.window + 1, key_block),) if problem.keys >= 4 * key_block else ()


def least_padding(length: int, largest: int) -> int:
    """Returns the largest block of at most ``largest`` tokens that divides ``length`` with the least padding."""
    return math.ceil(length / math.ceil(length / largest))


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_core_each() -> bool:
    """Returns True if this process has as many CPU devices as cores.

    Then each device's program runs beside the others on a core of its own, and products need not be so large that
    several cores can share them.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() >= num_cores()
