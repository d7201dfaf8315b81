"""Which queries stand for all of them when the role gradient of masked-out pairs is sampled.

A stratified draw: the sequence's short runs of queries are cut into strata of (nearly) equal size, and one run is drawn
from each.
A run that stands for ``n`` runs gets the weight ``n``, so that every sum over queries keeps its expectation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SampledRows(NamedTuple):
    """The queries that are looked at, in index order.

    Attributes:
      queries: int32 ``[r]``, queries; those of a last run that is cut short repeat the last query with weight 0.
      weight: float32 ``[r]``, how many queries each stands for.
    """

    queries: jax.Array
    weight: jax.Array


def num_strata(length: int, fraction: float, run: int, parts: int = 1) -> int:
    """Returns the number of runs of ``run`` queries in ``fraction`` of ``length``; one per part at least."""
    runs = -(-length // run)
    return min(runs, -(-max(1, round(fraction * runs)) // parts) * parts)


def draw_rows(key: jax.Array, *, length: int, fraction: float, run: int, parts: int = 1) -> SampledRows:
    """Samples queries, one run in each stratum.

    Args:
      key: PRNG key.
      length: of the sequence, queries.
      fraction: of the queries to be drawn, in (0, 1].
      run: neighboring queries that are sampled together.
      parts: equal parts of the sequence, each a multiple of ``run`` long if they are several, that get as many rows
        each, one after the other.

    Returns:
      ``SampledRows`` of about ``fraction · length`` rows, a number that follows from the arguments alone.
    """
    if parts > 1 and length % (parts * run):
        raise ValueError(f"{length} queries are not {parts} parts of whole runs of {run}.")
    runs, strata = -(-length // run), num_strata(length, fraction, run, parts)
    edges = (np.arange(strata + 1, dtype=np.int64) * runs // strata).astype(np.int32)  # the product may be beyond int32
    size = edges[1:] - edges[:-1]
    drawn = edges[:-1] + jax.random.randint(key, (strata,), 0, size)
    index = (drawn[:, None] * run + jnp.arange(run, dtype=jnp.int32)).reshape(-1)
    weight = jnp.asarray(np.repeat(size.astype(np.float32), run))
    return SampledRows(jnp.minimum(index, length - 1), jnp.where(index < length, weight, 0))
