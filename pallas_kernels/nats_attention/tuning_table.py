"""The tiling of a call that gives none: from the table of timed problems, else from the backend's heuristics.

``tuning_table.json`` holds what ``python -m pallas_kernels.nats_attention.autotune`` wrote: for a backend, a kind of
device and a problem, the blocks that were fastest. An entry serves problems of the same dtype, head dim and group, the
same number of batch · KV heads to a factor of 2, and the same length to a factor of √2; thresholds follow from the
problem.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax

from pallas_kernels.nats_attention.backend import Backend
from pallas_kernels.nats_attention.tiling import Problem, Tiling, lifetime_thresholds, one_core_each

TABLE = pathlib.Path(__file__).with_name("tuning_table.json")
_FACTORS = {"keys": math.sqrt(2), "queries": math.sqrt(2), "heads": 2.0}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
      backend: its name in ``api.BACKENDS``.
      device: ``device_kind()`` of what it was timed on.
      problem: that was timed.
      tiling: fields of the backend's tiling, without ``thresholds``.
    """

    backend: str
    device: str
    problem: Problem
    tiling: dict[str, Any]

    def distance(self, problem: Problem) -> float | None:
        """Returns the distance of a problem from the timed one; None if this entry does not apply to it."""
        mine, other = self.problem, problem
        if (mine.dtype, mine.head_dim, mine.group) != (other.dtype, other.head_dim, other.group):
            return None
        distances = []
        for name, factor in _FACTORS.items():
            apart = abs(math.log(_size(mine, name) / _size(other, name)))
            if apart > math.log(factor) + 1e-6:
                return None
            distances.append(apart)
        return sum(distances)


def _size(problem: Problem, name: str) -> int:
    return problem.batch * problem.num_kv_heads if name == "heads" else getattr(problem, name)


@functools.cache
def read_table(path: pathlib.Path = TABLE) -> tuple[Entry, ...]:
    """Reads the entries of a table; none if there is no file."""
    if not path.exists():
        return ()
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Entry(row["backend"], row["device"], Problem(**row["problem"]), row["tiling"]) for row in rows)


def write_table(entries: list[Entry], path: pathlib.Path = TABLE) -> None:
    """Writes a table that ``read_table`` reads."""
    rows = [{**dataclasses.asdict(entry), "problem": entry.problem._asdict()} for entry in entries]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def device_kind() -> str:
    """Returns the kind of device of the mesh in use (set by AOT compilation), or else of JAX's default device.

    "cpu core" where each CPU device has a core to itself: other tiles are fast there than on one device of many cores.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return "cpu core" if kind == "cpu" and one_core_each() else kind


def choose(name: str, backend: Backend, problem: Problem, table: tuple[Entry, ...] | None = None) -> Tiling:
    """Chooses the tiling for a problem on the device in use.

    Args:
      name: of the backend in ``api.BACKENDS``.
      backend: the backend.
      problem: its sizes.
      table: what was timed; None: ``tuning_table.json``.
    """
    default = backend.default_tiling(problem)
    near = []
    for entry in read_table() if table is None else table:
        if (entry.backend, entry.device) != (name, device_kind()):
            continue
        distance = entry.distance(problem)
        if distance is not None:
            near.append((distance, entry))
    if not near:
        return default
    _, entry = min(near, key=lambda pair: pair[0])
    thresholds = lifetime_thresholds(problem, entry.tiling["key_block"])
    return dataclasses.replace(default, **entry.tiling, thresholds=thresholds)
