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
from natsjax.data.mixture import MixtureSource, Part, load_mixture, mixture_contexts
from natsjax.data.packing import Row
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
    """

    row: Callable[[int], Row]
    vocabulary: Vocabulary
    corpora: tuple[Corpus, ...] = ()

    def documents_in_batch(self, step: int, batch_size: int) -> int | None:
        """Counts the documents of the batch of a training step; returns None where nothing is a document."""
        if not self.corpora:
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
    length, seed = config.data.context_length, config.train.seed
    if not prepared:
        task = RecallTask(length, seed=seed, **dataclasses.asdict(config.data.recall))
        return Data(lambda index: _row(task.rows(index, 1, split=split), 0), task)
    is_mixture = "=" in prepared and not (Path(prepared) / CORPUS_FILE).exists()
    parts = load_mixture(prepared) if is_mixture else [Part(Corpus.load(prepared), 1.0)]
    corpora = tuple(part.corpus for part in parts)
    if split == "train":
        source = MixtureSource(parts, context_length=length, seed=seed, shuffle=config.data.shuffle)
        return Data(source.__getitem__, corpora[0].tokenizer, corpora)
    contexts = mixture_contexts(parts, split, context_length=length, max_contexts=config.eval.num_contexts)
    count = len(contexts["inputs"])

    def row(index: int) -> Row:
        if index >= count:
            raise UserError(
                f"--context={index}: the slice of the split {split!r} has {count} contexts, 0 to {count - 1}."
            )
        return _row(contexts, index)

    return Data(row, corpora[0].tokenizer, corpora)


def example_at(data: Data, split: str, index: int, place: dict[str, Any]) -> Example:
    """Returns context ``index`` of a split, with the ids of its documents; ``place`` has more to show about its place.

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


def _row(rows: Row, index: int) -> Row:
    return {name: values[index] for name, values in rows.items()}
