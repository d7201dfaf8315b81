"""Shapes and role patterns that the attention tests share (and benchmarks may)."""

import itertools
from typing import NamedTuple

import numpy as np

from pallas_kernels.nats_attention import GLOBAL, LOCAL, SLIDING


class Shape(NamedTuple):
    """One attention problem: batch, length, KV heads, query heads per KV head, head dim, window (or several)."""

    b: int
    length: int
    k: int
    g: int
    h: int
    window: int | tuple[int, ...]

    @property
    def sliding(self) -> list[int]:
        """The SLIDING roles."""
        return [SLIDING + i for i in range(len(self.window) if isinstance(self.window, tuple) else 1)]

    @property
    def num_roles(self) -> int:
        """GLOBAL, LOCAL, and a SLIDING role for each window."""
        return SLIDING + len(self.sliding)


SHAPES = {
    "one_token": Shape(1, 1, 1, 1, 4, 1),
    "tiny": Shape(2, 6, 1, 1, 4, 1),
    "grouped": Shape(2, 23, 2, 3, 8, 3),
    "no_window": Shape(1, 17, 2, 1, 4, 0),
    "wide_window": Shape(1, 19, 1, 2, 4, 40),
    "ladder": Shape(2, 23, 2, 2, 8, (1, 3, 9)),
    "two_blocks": Shape(1, 301, 1, 1, 4, 5),
}

ROLE_PATTERNS = ("random", "all_global", "no_global", "all_sliding", "all_local", "bursts")


def pairs_of(*kinds: tuple[str, ...], every: bool) -> list[tuple[str, ...]]:
    """Returns every combination of the kinds, or as few as have each of them once."""
    if every:
        return list(itertools.product(*kinds))
    most = max(len(kind) for kind in kinds)
    return list(itertools.islice(zip(*(itertools.cycle(kind) for kind in kinds), strict=True), most))


def role_ids(pattern: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Draws roles of the named pattern, int32 ``[b, k, s]``."""
    size = (shape.b, shape.k, shape.length)
    if pattern == "random":
        return rng.integers(0, shape.num_roles, size).astype(np.int32)
    if pattern == "no_global":
        return rng.choice([LOCAL, *shape.sliding], size).astype(np.int32)
    if pattern == "bursts":  # GLOBAL tokens come in runs, far apart
        run = rng.random((*size[:2], -(-shape.length // 5))) < 0.3
        burst = np.repeat(run, 5, axis=-1)[..., : shape.length]
        return np.where(burst, GLOBAL, rng.choice([LOCAL, *shape.sliding], size)).astype(np.int32)
    constant = {"all_global": GLOBAL, "all_sliding": SLIDING, "all_local": LOCAL}[pattern]
    return np.full(size, constant, np.int32)


def document_ends(kind: str, shape: Shape, rng: np.random.Generator) -> np.ndarray | None:
    """Returns int32 ``[b, s]``, of ``packed`` documents, those with ``padding`` at the end, or a ``whole`` sequence.

    Of ``one`` document it is None, which is another program.
    """
    if kind == "one":
        return None
    if kind == "whole":
        return np.full((shape.b, shape.length), shape.length, np.int32)
    rows = []
    for _ in range(shape.b):
        used = shape.length if kind == "packed" else max(1, shape.length - 1 - int(rng.integers(shape.length // 2 + 1)))
        cuts = np.sort(rng.choice(np.arange(1, used + 1), min(3, used), replace=False))
        cuts = np.unique(np.append(cuts, used))
        row = cuts[np.searchsorted(cuts, np.arange(used), side="right")]
        rows.append(np.pad(row, (0, shape.length - used)))
    return np.stack(rows).astype(np.int32)


_EDGES = (-(2**31), 1 - 2**31, -2, -1, 0, 1, 2, 2**31 - 2, 2**31 - 1)


def any_positions(size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws positions of a sequence, int64 within int32: in order or not, far out, negative."""
    index, span = np.arange(size[-1]), int(rng.choice([3, size[-1], 4 * size[-1]]))
    ways = (
        lambda: np.broadcast_to(index, size),
        lambda: index + rng.integers(-3 * span, span, (*size[:-1], 1)),
        lambda: np.sort(rng.integers(-span, span, size), axis=-1),
        lambda: rng.integers(-span, span, size),
        lambda: rng.integers(-2, 3, size),
        lambda: _EDGES[0] + rng.integers(0, span, size),
        lambda: _EDGES[-1] - rng.integers(0, span, size),
        lambda: rng.choice(_EDGES, size),
    )
    return ways[rng.integers(len(ways))]()


def any_ends(key_position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws int64 ends of keys: short lives, none, no end, ends that have nothing to do with the positions."""
    size = key_position.shape
    lives = np.minimum(key_position + rng.integers(0, int(rng.choice([3, 2 * size[-1]])), size), _EDGES[-1])
    ways = (
        lambda: lives,
        lambda: np.where(rng.random(size) < 0.5, lives, rng.choice(_EDGES, size)),
        lambda: rng.integers(-size[-1], 2 * size[-1], size),
        lambda: rng.choice(_EDGES, size),
        lambda: np.full(size, _EDGES[-1]),
        lambda: np.zeros(size, np.int64),
    )
    return ways[rng.integers(len(ways))]()


class Placed(NamedTuple):
    """Positions and ends of keys, int32: ``query_position [b, t]``, ``key_position`` and ``key_end [b, k, s]``."""

    query_position: np.ndarray
    key_position: np.ndarray
    key_end: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        """Returns which query reads which key by the definition, bool ``[b, k, t, s]``."""
        at = self.query_position[:, None, :, None]
        return (self.key_position[:, :, None] <= at) & (at < self.key_end[:, :, None])


def any_places(b: int, t: int, s: int, k: int, rng: np.random.Generator) -> Placed:
    """Draws places, another way for each sequence; queries are often where keys are, some at -1 among the others."""
    rows = []
    for _ in range(b):
        key_position = any_positions((k, s), rng)
        chosen = rng.choice(key_position.reshape(-1), t) if rng.random() < 0.5 else any_positions((t,), rng)
        query_position = np.where(rng.random(t) < 0.2 * rng.integers(2), -1, chosen)
        rows.append((query_position, key_position, any_ends(key_position, rng)))
    return Placed(*(np.stack(x).astype(np.int32) for x in zip(*rows, strict=True)))
