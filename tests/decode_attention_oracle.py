"""Cases of decode attention, run by any backend and by the dense reference in float64."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels import decode_attention as da


class Shape(NamedTuple):
    """Layers, batch, KV heads, query heads per KV head, slots, head dim, slots in a block."""

    layers: int
    b: int
    k: int
    g: int
    c: int
    h: int
    u: int


class Case(NamedTuple):
    """Arguments of ``decode_attention``, keys and values as ``[l, b, k, c, h]``."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    key_end: np.ndarray
    length: np.ndarray
    position: np.ndarray


def case_of(shape: Shape, seed=0) -> Case:
    """Draws ragged lengths, one of 0 and one full, dead slots among the live, a head of dead slots alone."""
    layers, b, k, g, c, h, _ = shape
    rng = np.random.default_rng(seed)
    query = 3 * rng.normal(size=(b, k * g, h))
    key, value = rng.normal(size=(2, b, k, h))
    keys, values = rng.normal(size=(2, layers, b, k, c, h))
    length = rng.integers(0, c + 1, (layers, b, k))
    length[:, 0, 0], length[:, -1, -1], length[0, -1, 0] = 0, c, c // 3
    position = rng.integers(c, 2 * c, b)
    key_end = np.where(
        rng.random((layers, b, k, c)) < 0.3, position[:, None, None] - rng.integers(0, 9, (layers, b, k, c)), 4 * c
    )
    key_end[0, -1, 0] = position[-1]
    key_end = np.where(np.arange(c) < length[..., None], key_end, 0)
    return Case(query, key, value, keys, values, *(x.astype(np.int32) for x in (key_end, length, position)))


def cast(case: Case, dtype) -> Case:
    floats = case._fields.index("key_end")
    return Case(*(x.astype(dtype) for x in case[:floats]), *case[floats:])


@functools.partial(jax.jit, static_argnames=("format", "block", "implementation"))
def run(case: Case, layer, format, block, implementation):
    storage = da.Storage.of(case.keys, case.values, format, block)
    numbers = {"key_end": case.key_end, "length": case.length, "position": case.position}
    return da.decode_attention(
        case.query, case.key, case.value, storage, **numbers, layer=layer, implementation=implementation
    )


def expected_of(case: Case, layer):
    with jax.enable_x64(True):
        return np.asarray(run(cast(case, np.float64), layer, "plain", None, "reference"))
