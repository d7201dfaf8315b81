"""Several prepared corpora as one: each gives its share of the training contexts and of the evaluation.

Which corpus context `j` comes from is a fixed, evenly spread sequence: the heaviest corpus takes its share of all
numbers by `floor`, the next its share of what is left, and so on. This takes exact whole numbers and O(number of
corpora), whatever `j` is, and of any first `n` contexts each corpus has its share to within a few contexts.
(`grain.MapDataset.mix` spreads contexts likewise, but rounds weights to a hundredth of the smallest, and its sources
have to end.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from natsjax.data.corpus import Corpus
from natsjax.data.packing import Row, stack
from natsjax.data.pipeline import PackedSource, evaluation_contexts
from natsjax.data.tokenizer import Tokenizer
from natsjax.errors import UserError


def parse_mixture(text: str, field: str = "data.mixture") -> list[tuple[Path, Fraction]]:
    """Folders and weights of "DIR=WEIGHT,DIR=WEIGHT", as they are written; weights need not add up to 1.

    Raises:
      UserError: a weight is missing or not a positive number, or a folder is named twice.
    """
    parts: list[tuple[Path, Fraction]] = []
    for part in text.split(","):
        folder, equals, weight = part.strip().rpartition("=")
        if not equals or not folder or not weight:
            raise UserError(f"{field} = {text!r}: {part!r} is not DIR=WEIGHT, as in data/sotu=0.7.")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"{field}: the weight of {folder} is {weight!r}; it must be a number above 0.")
        parts.append((Path(folder), Fraction(repr(value))))
    seen: set[Path] = set()
    for path, _ in parts:
        if path.resolve() in seen:
            raise UserError(f"{field} names {path} twice; give it once, with the sum of its weights.")
        seen.add(path.resolve())
    return parts


def absolute_mixture(text: str) -> str:
    """The same mixture with full paths, whatever folder one is in."""
    return ",".join(f"{path.absolute()}={float(weight)!r}" for path, weight in parse_mixture(text))


class Spread:
    """Which part each number of an endless sequence belongs to, by exact shares.

    Args:
      weights: of the parts, above 0.

    Attributes:
      shares: of the parts, adding up to 1.
    """

    def __init__(self, weights: Sequence[Fraction]):
        scale = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._total = sum(self._weights)
        self.shares = [Fraction(weight, self._total) for weight in self._weights]
        # From the heaviest on: what rounding adds up to is smallest so.
        self._order = sorted(range(len(weights)), key=lambda part: -self._weights[part])

    def locate(self, index: int) -> tuple[int, int]:
        """The part that number `index` belongs to, and how many of that part come before it."""
        left = self._total
        for part in self._order:
            rest = left - self._weights[part]
            before = index * rest // left  # of the numbers before this one, those that go to later parts
            if (index + 1) * rest // left == before:
                return part, index - before
            index, left = before, rest
        raise AssertionError("the last part takes whatever is left")

    def counts(self, count: int) -> list[int]:
        """How many of the first `count` numbers each part has."""
        counts = [0] * len(self._weights)
        left = self._total
        for part in self._order:
            rest = left - self._weights[part]
            later = count * rest // left
            counts[part] = count - later
            count, left = later, rest
        return counts


class MixtureSource:
    """The infinite stream of contexts of a mixture; threads may share it, and it can be pickled.

    Each corpus keeps its own stream, with its own epochs; no context of it is left out or comes twice. `document_id`
    counts the documents of the corpora one after the other.

    Args:
      sources: of the corpora.
      weights: of the corpora, above 0.
      num_documents: in each corpus.
    """

    def __init__(self, sources: Sequence[PackedSource], weights: Sequence[Fraction], num_documents: Sequence[int]):
        self.sources = list(sources)
        self._spread = Spread(weights)
        self._offsets = _offsets(num_documents)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch: as many as the training documents of all corpora have, with BOS and EOS.

        A corpus whose share is larger than its part of them is gone through more than once in it, others less.
        """
        return sum(source.epoch_tokens for source in self.sources)

    def corpus_of(self, index: int) -> int:
        """Which corpus context `index` comes from, by its place in the mixture."""
        return self._spread.locate(index)[0]

    def __getitem__(self, index: int) -> Row:
        """Context `index` of the stream, arrays `[t]` (see `natsjax.data.packing`)."""
        if index < 0:
            raise IndexError(f"context {index}: the stream begins at 0 and has no end to count from")
        corpus, within = self._spread.locate(index)
        return _with_offset(self.sources[corpus][within], self._offsets[corpus])

    def rows(self, begin: int, count: int) -> Row:
        """Contexts `begin … begin+count-1`, arrays `[count, t]`."""
        return stack([self[index] for index in range(begin, begin + count)])

    def piece_lengths(self) -> npt.NDArray[np.int64]:
        """Lengths of the document pieces of an epoch, each corpus by its share, int64 `[num_pieces]`."""
        return np.concatenate(
            [
                _first_tokens(source.piece_lengths(), round(share * self.epoch_tokens))
                for source, share in zip(self.sources, self._spread.shares, strict=True)
            ]
        )


@dataclass(frozen=True)
class Mixture:
    """Prepared corpora with their weights, all of one tokenizer.

    Attributes:
      corpora: as they are named.
      weights: of each, above 0.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[Fraction, ...]

    @classmethod
    def load(cls, text: str, field: str = "data.mixture") -> Mixture:
        """Opens the corpora of "DIR=WEIGHT,DIR=WEIGHT".

        Args:
          text: the mixture.
          field: what errors call it.

        Raises:
          UserError: see `parse_mixture` and `Corpus.load`; tokenizers differ, or two folders hold the same corpus.

        Example:
          >>> mixture = Mixture.load("data/sotu=0.7,data/wiki=0.3")
          >>> mixture.source(context_length=256, seed=0)[0]["inputs"].shape
          (256,)
        """
        parts = parse_mixture(text, field)
        corpora = tuple(Corpus.load(folder) for folder, _ in parts)
        first = corpora[0]
        known: dict[str, Corpus] = {}
        for corpus in corpora:
            if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise UserError(
                    f"{field}: {corpus.folder} was prepared with another tokenizer than {first.folder}; prepare it "
                    f"again with --tokenizer={os.fspath(first.folder)}/tokenizer."
                )
            if corpus.content_hash in known:
                raise UserError(
                    f"{field}: {known[corpus.content_hash].folder} and {corpus.folder} hold the same corpus; give it "
                    "once, with the sum of its weights."
                )
            known[corpus.content_hash] = corpus
        return cls(corpora, tuple(weight for _, weight in parts))

    def __iter__(self) -> Iterator[tuple[Corpus, Fraction]]:
        """The corpora with their shares, which add up to 1."""
        return iter(zip(self.corpora, Spread(self.weights).shares, strict=True))

    @property
    def tokenizer(self) -> Tokenizer:
        """Of all corpora."""
        return self.corpora[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what the corpora hold and their shares, in their order."""
        parts = [[corpus.content_hash, str(share)] for corpus, share in self]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def source(self, *, context_length: int, seed: int) -> MixtureSource:
        """The training stream; that of a single corpus is the stream of `PackedSource.from_corpus`.

        Raises:
          UserError: see `PackedSource`.
        """
        sources = [
            PackedSource.from_corpus(corpus, context_length=context_length, seed=_seed_of(seed, place))
            for place, corpus in enumerate(self.corpora)
        ]
        return MixtureSource(sources, self.weights, self._num_documents("train"))

    def evaluation_contexts(self, split: str, *, context_length: int, max_contexts: int) -> Row:
        """A fixed slice of a split of all corpora, one corpus after the other.

        Each gives its share of `max_contexts`, or all that it has where these are fewer; one whose share is less than
        a context may give none.

        Args:
          split: `"validation"` or `"train"`.
          context_length: tokens in a context, `t`.
          max_contexts: how many contexts at most.

        Returns:
          Arrays `[num_contexts, t]`; `document_id` counts the documents of the corpora one after the other.

        Raises:
          UserError: see `natsjax.data.evaluation_contexts`.
        """
        if max_contexts < 1:
            raise UserError(f"max_contexts is {max_contexts}; it must be at least 1.")
        counts = Spread(self.weights).counts(max_contexts)
        found = [
            _with_offset(evaluation_contexts(corpus, split, context_length=context_length, max_contexts=count), offset)
            for corpus, count, offset in zip(self.corpora, counts, _offsets(self._num_documents(split)), strict=True)
            if count
        ]
        return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}

    def _num_documents(self, split: str) -> list[int]:
        return [len(corpus.documents(split)) for corpus in self.corpora]


def _seed_of(seed: int, place: int) -> int:
    """Of a corpus's stream: corpora with equally many documents shall not be read in the same order."""
    if place == 0 or seed < 0:  # a negative one is for PackedSource to refuse
        return seed
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint32)[0])


def _offsets(num_documents: Sequence[int]) -> list[int]:
    return [sum(num_documents[:place]) for place in range(len(num_documents))]


def _with_offset(row: Row, offset: int) -> Row:
    ids = row["document_id"]
    return row | {"document_id": np.where(ids < 0, ids, ids + offset).astype(ids.dtype)}


def _first_tokens(pieces: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The first `count` tokens of pieces that come again and again, the last piece cut off."""
    whole, rest = divmod(count, int(pieces.sum()))
    ends = np.minimum(np.cumsum(pieces), rest)
    last = np.diff(ends, prepend=0)
    return np.concatenate([np.tile(pieces, whole), last[last > 0]])
