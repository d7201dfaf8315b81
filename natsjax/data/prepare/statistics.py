"""A prepared corpus in numbers and as text: counts, lengths of documents, what a window alone costs in KV."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from natsjax import kv_fraction
from natsjax.data.corpus import Corpus
from natsjax.data.pipeline import PackedSource
from natsjax.data.readers.input_report import report_lines

PERCENTILES = (10, 50, 90, 99)
CONTEXT_LENGTHS = (256, 1024, 4096)
WINDOWS = (4, 16, 64, 256)


def length_quantiles(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    """Returns percentiles of the lengths of documents, those that there are enough documents for.

    Args:
      lengths: int64 ``[num_documents]``, tokens in each document, without BOS and EOS; at least one.

    Returns:
      ``p10``, ``p50``, ``p90``, ``p99`` and ``max``, each the length of a document. A percentile with less than half a
      document beyond it is left out, for it is the longest or the shortest.
    """
    known = [p for p in PERCENTILES if len(lengths) * min(p, 100 - p) >= 50]
    values = np.percentile(lengths, known, method="inverted_cdf")
    quantiles = {f"p{percentile}": int(value) for percentile, value in zip(known, values, strict=True)}
    return quantiles | {"max": int(lengths.max())}


def all_sliding_kv_fractions(
    corpus: Corpus,
    *,
    split: str = "train",
    context_lengths: Sequence[int] = CONTEXT_LENGTHS,
    windows: Sequence[int] = WINDOWS,
) -> dict[int, dict[int, float]]:
    """Returns the KV fraction, in (0, 1], of all tokens SLIDING, by context length and then by window.

    It is ``natsjax.kv_fraction.all_sliding_kv_fraction`` on the document pieces of one epoch of training contexts, with
    seed 0. Windows that reach over a whole context are left out, and contexts longer than the split.
    """
    table: dict[int, dict[int, float]] = {}
    for context_length in context_lengths:
        source = PackedSource.from_corpus(corpus, context_length=context_length, seed=0, split=split)
        if context_length > source.epoch_tokens:
            continue
        pieces = source.piece_lengths()
        table[context_length] = {
            window: kv_fraction.all_sliding_kv_fraction(pieces, window) for window in windows if window < context_length
        }
    return table


def describe(corpus: Corpus) -> list[str]:
    """Describes a corpus in lines for people."""
    lines = []
    for name, summary in corpus.summaries.items():
        lines.append(
            f"{name:<10} {summary.documents:>9,} documents  {summary.tokens:>13,} tokens  "
            f"{summary.bytes:>14,} bytes  {summary.bytes_per_token:.2f} bytes/token"
        )
        quantiles = length_quantiles(corpus.documents(name).lengths)
        shown = ", ".join(f"{quantile} {value:,}" for quantile, value in quantiles.items())
        lines.append(f"{'':<10} tokens in a document: {shown}")
    left_out = []
    if corpus.arguments.get("deduplicate"):
        left_out.append(f"{corpus.dropped.get('duplicate', 0):,} exact copies")
    left_out.append(f"{corpus.dropped.get('empty', 0):,} documents without text")
    left_out.append(f"{len(corpus.skipped_files):,} bad files")
    lines.append(f"left out: {', '.join(left_out)}")
    for name, report in corpus.input_report.items():
        lines += report_lines(name, report)
    return lines + _kv_table(all_sliding_kv_fractions(corpus))


def _kv_table(table: dict[int, dict[int, float]]) -> list[str]:
    if not table:
        return [f"no table of KV fractions: the text is shorter than {CONTEXT_LENGTHS[0]} tokens"]
    lines = [
        "KV fraction with all tokens SLIDING but the first of each document piece:",
        f"{'context':>12}" + "".join(f"{f'window {window}':>12}" for window in WINDOWS),
    ]
    for context_length, fractions in table.items():
        cells = (f"{fractions[window]:.4f}" if window in fractions else "-" for window in WINDOWS)
        lines.append(f"{context_length:>12}" + "".join(f"{cell:>12}" for cell in cells))
    return lines
