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


_Z = float(special.ndtri(0.975))


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
    """Computes the 95 % interval of a fraction of independent trials.

    Args:
      fraction: of the trials that succeeded.
      count: trials, 1 or more.

    Returns:
      ``(low, high)``; also where all or none succeeded.

    Source: Wilson 1927, as in Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), 3.
    """
    middle = (fraction + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(fraction * (1 - fraction) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    # Where none or all succeeded, that end is exact but for rounding.
    return (0.0 if fraction == 0 else middle - half), (1.0 if fraction == 1 else middle + half)


def paired_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Compares two fractions of successes of the same trials.

    Args:
      one, other: bool ``[n]``, success by trial, ``n`` at least 1.

    Returns:
      The fraction of ``one`` less that of ``other``, and the ends of its 95 % interval.

    Source: Newcombe 1998 (Statistics in Medicine 17, pages 2635 to 2650), method 10: Wilson's intervals of both, and
    their correlation with a correction for continuity.
    """
    count = len(one)
    first, second = float(np.mean(one)), float(np.mean(other))
    both, neither = int(np.sum(one & other)), int(np.sum(~one & ~other))
    only_one, only_other = int(np.sum(one & ~other)), int(np.sum(~one & other))
    (low, high), (other_low, other_high) = wilson_interval(first, count), wilson_interval(second, count)
    product = float(both * neither - only_one * only_other)
    if product > 0:
        product = max(product - count / 2, 0.0)
    sizes = [both + only_one, only_other + neither, both + only_other, only_one + neither]
    correlation = product / math.sqrt(math.prod(sizes)) if all(sizes) else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2))

    difference = first - second
    below = reach(first - low, other_high - second)
    above = reach(high - first, second - other_low)
    return difference, max(-1.0, difference - below), min(1.0, difference + above)
