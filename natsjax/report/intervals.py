"""Intervals by resampling documents, of a mean and of the ratio of two perplexities on the same documents."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from natsjax.report.results import MIN_DOCUMENTS, MIN_RESAMPLINGS

NO_RATIO: dict[str, float | None] = dict.fromkeys(("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high"))
"""Fields of a row that is compared with nothing."""


def bootstrap_interval(
    numerator: np.ndarray, denominator: np.ndarray, *, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the 95 % percentile interval of ``sum(numerator) / sum(denominator)`` by resampling documents.

    Args:
      numerator, denominator: float64 ``[d, …]``, by document.
      num_samples: resamplings.
      seed: of the resampling; the same seed samples the same documents for all rows of a table.

    Returns:
      ``(low, high)``, float64 ``[…]``. Both are NaN if the spread is not known: with fewer than ``MIN_DOCUMENTS``
      documents whose denominator is not 0, fewer than ``MIN_RESAMPLINGS`` resamplings, or documents that are all alike.

    Source: Hesterberg 2015 (arXiv:1411.5279), section 3.2: percentiles are expanded for few documents, because plain
    ones cover too little.
    """
    count = len(numerator)
    samples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_samples)
    above, below = (np.tensordot(samples, values, axes=1) for values in (numerator, denominator))
    ratios = np.full_like(above, np.nan)
    np.divide(above, below, out=ratios, where=below != 0)
    documents = np.count_nonzero(denominator, axis=0)
    low, high = np.full(above.shape[1:], np.nan), np.full(above.shape[1:], np.nan)
    for place in np.ndindex(low.shape):
        known = ratios[(slice(None), *place)]
        known = known[np.isfinite(known)]
        if documents[place] >= MIN_DOCUMENTS and len(known) >= MIN_RESAMPLINGS:
            tail = _expanded_tail(int(documents[place]))
            low[place], high[place] = np.quantile(known, [tail, 1 - tail])
    alike = np.isclose(low, high, rtol=1e-6, atol=0)  # to float32's rounding
    return np.where(alike, np.nan, low)[()], np.where(alike, np.nan, high)[()]


def _expanded_tail(count: int) -> float:
    """Computes the fraction of resamplings beyond each end of a 95 % interval: 0.025 for many documents."""
    return float(special.ndtr(math.sqrt(count / (count - 1)) * special.stdtrit(count - 1, 0.025)))


def paired_ratio(
    nll: np.ndarray, other: np.ndarray, tokens: np.ndarray, *, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares two perplexities on the same documents, or several such pairs.

    Documents differ by far more than methods do. So each document is compared with itself, and the resamplings have the
    same documents in both perplexities.

    Args:
      nll: float64 ``[d, …]``, sum of the negative log-likelihood by document, nats.
      other: float64 ``[d, …]``, that of what it is compared with.
      tokens: float64 ``[d, …]``, predicted tokens, the same of both.
      num_samples, seed: as in ``bootstrap_interval``.

    Returns:
      The ratio of the perplexities (NaN where there is no token) and the ends of its 95 % interval (NaN where the
      spread is not known), float64 ``[…]``.
    """
    difference = np.subtract(nll, other)
    ends = bootstrap_interval(difference, tokens, num_samples=num_samples, seed=seed)
    with np.errstate(invalid="ignore"):
        mean = difference.sum(axis=0) / np.sum(tokens, axis=0)
    middle, low, high = map(np.exp, (mean, *ends))
    return middle, low, high


def ratio_fields(
    nll: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray,
    *,
    num_samples: int,
    seed: int,
) -> dict[str, float | None]:
    """Returns ``perplexity_ratio`` of a row and its interval, as ``paired_ratio`` computes them; None for NaN."""
    sums = (np.asarray(values, np.float64) for values in (nll, other, tokens))
    found = map(float, paired_ratio(*sums, num_samples=num_samples, seed=seed))
    return {name: None if math.isnan(value) else value for name, value in zip(NO_RATIO, found, strict=True)}


def slice_ratio_fields(
    name: str, nll: Any, other: Any, tokens: Any, *, num_samples: int, seed: int
) -> dict[str, list[float | None]]:
    """Returns a ratio of ``by_slice`` and its interval, as ``paired_ratio`` computes them; None for NaN.

    Args:
      name: of the field.
      nll, other, tokens: ``[z, d]``, as in ``paired_ratio``; ``other`` is NaN for a slice that has no partner.
      num_samples, seed: as in ``bootstrap_interval``.
    """
    sums = (np.asarray(values, np.float64).T for values in (nll, other, tokens))
    found = paired_ratio(*sums, num_samples=num_samples, seed=seed)
    return {name + end: rounded(values) for end, values in zip(("", "_low", "_high"), found, strict=True)}


def rounded(values: np.ndarray) -> list[float | None]:
    """Rounds to five significant digits, for a list in a row; None for NaN."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
