"""Contexts of a corpus, a mixture or the recall task, by number."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from natsjax.config import Config
from natsjax.data.corpus import CORPUS_FILE, Corpus
from natsjax.data.inspect.examples import Example
from natsjax.data.mixture import MixtureSource, load_mixture, mixture_contexts
from natsjax.data.packing import Row
from natsjax.data.pipeline import PackedSource, RowSource, evaluation_contexts
from natsjax.data.recall import RecallTask
from natsjax.data.tokenizers import Vocabulary
from natsjax.errors import UserError


@dataclass(frozen=True)
class Data:
    """Contexts of a split, and how to read them.

    Attributes:
      row: gives context ``index``, arrays ``[t]``.
      vocabulary: the tokens.
      corpora: that the documents come from, in the order in which their documents are counted; none for recall.
      is_stream: whether these are the contexts that steps take their batches from.
    """

    row: Callable[[int], Row]
    vocabulary: Vocabulary
    corpora: tuple[Corpus, ...] = ()
    is_stream: bool = False

    def documents_in_batch(self, step: int, batch_size: int) -> int | None:
        """Counts the documents of the batch of a training step; returns None where nothing is a document.

        Args:
          step: from 0.
          batch_size: rows of it.
        """
        if not self.is_stream:
            return None
        rows = [self.row(index)["document_id"] for index in range(step * batch_size, (step + 1) * batch_size)]
        return len(np.unique(np.concatenate(rows)))


def open_data(config: Config, split: str, prepared: str) -> Data:
    """Opens the contexts that a run with this config sees.

    Args:
      config: of the run.
      split: ``"train"`` or ``"validation"``.
      prepared: folder of the corpus, or DIR=WEIGHT,DIR=WEIGHT; empty for the recall task.

    Raises:
      UserError: the data is not there, or damaged.
    """
    length, seed, most = config.data.context_length, config.train.seed, config.eval.num_contexts
    shuffle = config.data.shuffle
    if not prepared:
        task = RecallTask(length, seed=seed, **dataclasses.asdict(config.data.recall))
        return Data(lambda index: _unstacked(task.rows(index, 1, split=split)), task)
    if "=" in prepared and not (Path(prepared) / CORPUS_FILE).exists():
        parts = load_mixture(prepared)
        corpora = tuple(part.corpus for part in parts)
        if split == "train":
            row = _rows_of(MixtureSource(parts, context_length=length, seed=seed, shuffle=shuffle))
        else:
            row = _slice_of(mixture_contexts(parts, split, context_length=length, max_contexts=most), split)
        return Data(row, corpora[0].tokenizer, corpora, is_stream=split == "train")
    corpus = Corpus.load(prepared)
    if split == "train":
        row = _rows_of(PackedSource.from_corpus(corpus, context_length=length, seed=seed, shuffle=shuffle))
    else:
        row = _slice_of(evaluation_contexts(corpus, split, context_length=length, max_contexts=most), split)
    return Data(row, corpus.tokenizer, (corpus,), is_stream=split == "train")


def example_at(data: Data, split: str, index: int, place: dict[str, Any]) -> Example:
    """Returns context ``index`` of a split, with the ids of its documents.

    Args:
      data: of the split.
      split: its name.
      index: which context.
      place: more about where it stands, to be shown.

    Raises:
      UserError: there is no such context, or files of a corpus are missing or damaged.
    """
    row = data.row(index)
    documents = [corpus.documents(split) for corpus in data.corpora]
    ends = list(itertools.accumulate(len(of) for of in documents))

    def name(document: int) -> str:
        corpus = bisect.bisect_right(ends, document)
        return documents[corpus].ids[document - (ends[corpus] - len(documents[corpus]))]

    place = {"context": index} | place
    if len(data.corpora) > 1:
        # Documents of all corpora are counted one after the other, and no context holds those of two.
        place["corpus"] = str(data.corpora[bisect.bisect_right(ends, int(row["document_id"][0]))].folder)
    return Example(row, data.vocabulary, name if documents else None, place)


def _rows_of(source: RowSource) -> Callable[[int], Row]:
    return lambda index: _unstacked(source.rows(index, 1))


def _unstacked(rows: Row) -> Row:
    return {name: values[0] for name, values in rows.items()}


def _slice_of(contexts: Row, split: str) -> Callable[[int], Row]:
    count = len(contexts["inputs"])

    def row(index: int) -> Row:
        if index >= count:
            raise UserError(
                f"--context={index}: the slice of the split {split!r} has {count} contexts, 0 to {count - 1}."
            )
        return {name: values[index] for name, values in contexts.items()}

    return row
