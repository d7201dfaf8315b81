"""Shapes and role patterns that the attention tests share (and benchmarks may)."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.nats_attention import GLOBAL, LOCAL, SLIDING


class Shape(NamedTuple):
    """One attention problem: batch, length, KV heads, query heads per KV head, head dim, window."""

    b: int
    length: int
    k: int
    g: int
    h: int
    window: int


SHAPES = {
    "one_token": Shape(1, 1, 1, 1, 4, 1),
    "tiny": Shape(2, 6, 1, 1, 4, 1),
    "grouped": Shape(2, 23, 2, 3, 8, 3),
    "no_window": Shape(1, 17, 2, 1, 4, 0),
    "wide_window": Shape(1, 19, 1, 2, 4, 40),
    "two_blocks": Shape(1, 301, 1, 1, 4, 5),
}

ROLE_PATTERNS = ("random", "all_global", "no_global", "all_sliding", "all_local", "bursts")


def role_ids(pattern: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """int32 ``[b, k, s]`` of the named pattern."""
    size = (shape.b, shape.k, shape.length)
    if pattern == "random":
        return rng.integers(0, 3, size).astype(np.int32)
    if pattern == "no_global":
        return rng.choice([LOCAL, SLIDING], size).astype(np.int32)
    if pattern == "bursts":  # GLOBAL tokens come in runs, far apart
        run = rng.random((*size[:2], -(-shape.length // 5))) < 0.3
        burst = np.repeat(run, 5, axis=-1)[..., : shape.length]
        return np.where(burst, GLOBAL, rng.choice([LOCAL, SLIDING], size)).astype(np.int32)
    constant = {"all_global": GLOBAL, "all_sliding": SLIDING, "all_local": LOCAL}[pattern]
    return np.full(size, constant, np.int32)


def document_ends(kind: str, shape: Shape, rng: np.random.Generator) -> np.ndarray | None:
    """int32 ``[b, s]`` or None: ``one`` document, ``packed`` ones, or packed ones with ``padding`` at the end."""
    if kind == "one":
        return None
    rows = []
    for _ in range(shape.b):
        used = shape.length if kind == "packed" else max(1, shape.length - 1 - int(rng.integers(shape.length // 2 + 1)))
        cuts = np.sort(rng.choice(np.arange(1, used + 1), min(3, used), replace=False))
        cuts = np.unique(np.append(cuts, used))
        row = cuts[np.searchsorted(cuts, np.arange(used), side="right")]
        rows.append(np.pad(row, (0, shape.length - used)))
    return np.stack(rows).astype(np.int32)
