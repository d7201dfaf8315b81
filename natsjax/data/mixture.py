"""Several prepared corpora as one stream, in which each has a fixed fraction of the contexts.

The sequence of corpora is fixed and evenly spread: the corpus with the largest fraction takes it of all numbers, the
next one its part of the remaining numbers, and so on, in integers without rounding errors. The corpus of context ``j``
is found in O(number of corpora), and of any first ``n`` contexts each corpus has its fraction to within a few contexts.
(``grain.MapDataset.mix`` spreads contexts in the same way, but rounds weights to hundredths of the smallest.)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from natsjax.data.corpus import Corpus
from natsjax.data.packing import Row, stack
from natsjax.data.pipeline import PackedSource, Shuffle, evaluation_contexts
from natsjax.errors import UserError


@dataclass(frozen=True)
class Part:
    """A corpus and its fraction of the mixture; fractions add up to 1."""

    corpus: Corpus
    fraction: float


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parses "DIR=WEIGHT,DIR=WEIGHT" to folders and fractions: the weights, scaled to add up to 1.

    Raises:
      UserError: a weight is missing or not a positive number, or a folder is named twice.
    """
    weights: dict[str, float] = {}
    seen: set[Path] = set()
    for part in text.split(","):
        folder, equals, weight = part.strip().rpartition("=")
        if not equals or not folder:
            raise UserError(f"the mixture {text!r} has no weight for {part.strip()!r}; give DIR=WEIGHT,DIR=WEIGHT.")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"the mixture has the weight {weight!r} for {folder}; a number above 0 was expected.")
        if Path(folder).resolve() in seen:
            raise UserError(f"the mixture names {folder} twice; give it once, with the sum of its weights.")
        seen.add(Path(folder).resolve())
        weights[folder] = value
    total = sum(weights.values())
    if total == math.inf:
        raise UserError(f"the weights of the mixture {text!r} are too large to be added; divide them by a number.")
    return [(folder, weight / total) for folder, weight in weights.items()]


def load_mixture(text: str) -> list[Part]:
    """Opens the corpora of "DIR=WEIGHT,DIR=WEIGHT".

    Raises:
      UserError: see ``parse_mixture`` and ``Corpus.load``; tokenizers differ, or two folders hold the same corpus.

    Example:
      >>> parts = load_mixture("data/sotu=0.7,data/wiki=0.3")
      >>> MixtureSource(parts, context_length=256, seed=0)[0]["inputs"].shape
      (256,)
    """
    parts = [Part(Corpus.load(folder), fraction) for folder, fraction in parse_mixture(text)]
    first = parts[0].corpus
    known: dict[str, Corpus] = {}
    for part in parts:
        corpus = part.corpus
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            mine, other = (f"({x.tokenizer.kind} of {x.tokenizer.vocab_size})" for x in (corpus, first))
            raise UserError(
                f"{corpus.folder} was prepared with another tokenizer {mine} than {first.folder} {other}; prepare all "
                "corpora of a mixture with the same one."
            )
        if corpus.content_hash in known:
            raise UserError(
                f"{known[corpus.content_hash].folder} and {corpus.folder} are the same corpus; give it once in the "
                "mixture, with the sum of its weights."
            )
        known[corpus.content_hash] = corpus
    return parts


def mixture_fingerprint(parts: Iterable[tuple[str, float]]) -> str:
    """Hashes the content hashes of corpora and their fractions, in order: SHA-256 (hex)."""
    # Rounded, for a fraction that is written and read again may differ in its last bit.
    marks = [[content_hash, f"{fraction:.9g}"] for content_hash, fraction in parts]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def mixture_name(parts: Sequence[Part]) -> str:
    """Describes the corpora, with their fractions and sizes, for messages."""
    names = []
    for part in parts:
        counts = part.corpus.summaries["train"]
        name = f"{100 * part.fraction:.3g} % {part.corpus.folder}"
        names.append(f"{name} ({counts.documents} documents, {counts.tokens / 1e6:.2f}M tokens)")
    return f"mixture of {', '.join(names)}"


class MixtureSource:
    """The infinite stream of contexts of a mixture; threads may share it, and it can be pickled.

    Each corpus has its own stream with its own epochs, in which no context is omitted or repeated. ``document_id``
    counts the documents of one corpus after the other. The stream of a single corpus is its ``PackedSource``, whose
    arguments and mistakes are the same.

    Attributes:
      parts: the corpora, from ``load_mixture``.
      sources: the stream of each.
      epoch_tokens: tokens of the training documents of all corpora, with BOS and EOS: an epoch. In it a corpus with a
        fraction larger than its part of these tokens is read more than once, others less.
    """

    def __init__(self, parts: Sequence[Part], *, context_length: int, seed: int, shuffle: Shuffle = "contexts"):
        self.parts = list(parts)
        self.sources = [
            PackedSource.from_corpus(part.corpus, context_length=context_length, seed=seed, shuffle=shuffle)
            for part in parts
        ]
        self.epoch_tokens = sum(source.epoch_tokens for source in self.sources)
        self._weights = _whole_weights(parts)
        self._offsets = _offsets(parts, "train")

    def place(self, index: int) -> tuple[int, int]:
        """Returns the source of context ``index``: the corpus's index in ``parts`` and the number in its stream."""
        if index < 0:
            raise IndexError(f"context {index}: the stream begins at 0 and has no end")
        left = sum(self._weights)
        for part in _heaviest_first(self._weights):
            rest = left - self._weights[part]
            before = index * rest // left  # contexts of later parts before this one
            if (index + 1) * rest // left == before:
                return part, index - before
            index, left = before, rest
        raise AssertionError("the last part takes what is left")

    def __getitem__(self, index: int) -> Row:
        """Returns context ``index`` of the stream, arrays ``[t]`` (see ``natsjax.data.packing``)."""
        part, own = self.place(index)
        return _with_offset(self.sources[part][own], self._offsets[part])

    def rows(self, begin: int, count: int) -> Row:
        """Returns contexts ``begin … begin+count-1``, arrays ``[count, t]``."""
        return stack([self[index] for index in range(begin, begin + count)])

    def piece_lengths(self) -> npt.NDArray[np.int64]:
        """Returns the lengths of the document pieces of an epoch, int64 ``[num_pieces]``."""
        return np.concatenate(
            [
                _first_tokens(source.piece_lengths(), round(part.fraction * self.epoch_tokens))
                for part, source in zip(self.parts, self.sources, strict=True)
            ]
        )


def mixture_contexts(parts: Sequence[Part], split: str, *, context_length: int, max_contexts: int) -> Row:
    """Returns ``evaluation_contexts`` of all corpora, one corpus after the other.

    Each corpus has its fraction of ``max_contexts``, or all of its contexts if these are fewer. A corpus with a
    fraction below one context may have none. ``document_id`` counts the documents of one corpus after the other.
    """
    if max_contexts < 1:
        raise UserError(f"max_contexts = {max_contexts}: it must be at least 1.")
    found = [
        _with_offset(evaluation_contexts(part.corpus, split, context_length=context_length, max_contexts=count), offset)
        for part, count, offset in zip(
            parts, _counts(_whole_weights(parts), max_contexts), _offsets(parts, split), strict=True
        )
        if count
    ]
    return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}


def _whole_weights(parts: Sequence[Part]) -> list[int]:
    """Returns integers in the ratio of the fractions."""
    # A fraction that was written and read again may differ in its last bit, which must not change the sequence.
    fractions = [Fraction(part.fraction).limit_denominator(10**9) or Fraction(part.fraction) for part in parts]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _heaviest_first(weights: list[int]) -> list[int]:
    """Returns the order in which rounding errors are smallest."""
    return sorted(range(len(weights)), key=lambda part: -weights[part])


def _counts(weights: list[int], count: int) -> list[int]:
    """Counts the contexts of each part among the first ``count``, in the sequence of ``MixtureSource.place``."""
    counts = [0] * len(weights)
    left = sum(weights)
    for part in _heaviest_first(weights):
        rest = left - weights[part]
        others = count * rest // left
        counts[part] = count - others
        count, left = others, rest
    return counts


def _offsets(parts: Sequence[Part], split: str) -> list[int]:
    """Returns the number that is added to the document ids of each corpus."""
    documents = [part.corpus.summaries[split].documents for part in parts]
    return [sum(documents[:place]) for place in range(len(documents))]


def _with_offset(row: Row, offset: int) -> Row:
    ids = row["document_id"]
    return row | {"document_id": np.where(ids < 0, ids, ids + offset).astype(ids.dtype)}


def _first_tokens(pieces: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Returns the first ``count`` tokens of the repeated pieces, as pieces; the last one is cut."""
    whole, rest = divmod(count, int(pieces.sum()))
    last = np.diff(np.minimum(np.cumsum(pieces), rest), prepend=0)
    return np.concatenate([np.tile(pieces, whole), last[last > 0]])
