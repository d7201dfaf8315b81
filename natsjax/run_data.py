"""The data that a config names: a prepared corpus (made when it is not there yet) or the recall task."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from natsjax.config import Config
from natsjax.data import (
    Corpus,
    PackedSource,
    RecallTask,
    Row,
    RowSource,
    Vocabulary,
    evaluation_contexts,
    load_tokenizer,
)
from natsjax.data.corpus import CORPUS_FILE
from natsjax.errors import UserError
from natsjax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run learns from and is measured on.

    Attributes:
      vocabulary: the tokens.
      source: training contexts by index.
      contexts: ``contexts(split, max_contexts)`` is a fixed slice of "train" or "validation", arrays ``[n, t]``.
      piece_lengths: int ``[num_pieces]``, tokens in each document piece of an epoch of training contexts.
      description: for people.
      fingerprint: SHA-256 (hex); other data has another one.
    """

    vocabulary: Vocabulary
    source: RowSource
    contexts: Callable[[str, int], Row]
    piece_lengths: np.ndarray
    description: str
    fingerprint: str


def open_data(config: Config, workdir: Workdir, *, progress: bool = True) -> RunData:
    """Opens the data, preparing the corpus first where needed.

    Raises:
      UserError: see ``natsjax.data.prepare``, ``natsjax.data.Corpus`` and ``natsjax.data.RecallTask``.
    """
    if config.data.source == "recall":
        return _open_recall(config)
    return _open_corpus(config, workdir, progress)


def _open_recall(config: Config) -> RunData:
    task = RecallTask(config.data.context_length, seed=config.train.seed, **dataclasses.asdict(config.data.recall))
    return RunData(
        vocabulary=task,
        source=task,
        contexts=lambda split, count: task.rows(0, count, split=split),
        piece_lengths=np.array([task.context_length]),
        description=f"associative recall of {task.num_pairs} pairs in {task.context_length} tokens",
        fingerprint=hashlib.sha256(json.dumps(dataclasses.asdict(task)).encode()).hexdigest(),
    )


def _open_corpus(config: Config, workdir: Workdir, progress: bool) -> RunData:
    data = config.data
    folder = data.prepared_dir or workdir.corpus
    # A run that has begun goes on with the corpus that it has, wherever the text is by now; a prepared_dir that holds a
    # corpus is what the user means by it.
    known = data.prepared_dir or workdir.has_checkpoint() or not data.input
    if known and ((pathlib.Path(folder) / CORPUS_FILE).exists() or not data.input):
        corpus = Corpus.load(folder)
        _check_tokenizer(config, corpus)
    else:
        # Here, because Python warns of a command (python -m natsjax.data.prepare) that `import natsjax` has imported.
        from natsjax.data.prepare import prepare

        corpus = prepare(
            data.input,
            folder,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            held_out_fraction=data.held_out_fraction,
            validation_input=data.validation_input,
            text_field=data.text_field,
            skip_bad_files=data.skip_bad_files,
            progress=progress,
        )
    counts = corpus.summaries["train"]
    source = PackedSource.from_corpus(corpus, context_length=data.context_length, seed=config.train.seed)
    return RunData(
        vocabulary=corpus.tokenizer,
        source=source,
        piece_lengths=source.piece_lengths(),
        contexts=lambda split, count: evaluation_contexts(
            corpus, split, context_length=data.context_length, max_contexts=count
        ),
        description=(
            f"{data.input or folder}, {counts.documents} documents, {counts.tokens / 1e6:.2f}M tokens, "
            f"{corpus.tokenizer.kind} tokenizer of {corpus.tokenizer.vocab_size}"
        ),
        fingerprint=corpus.content_hash,
    )


def _check_tokenizer(config: Config, corpus: Corpus) -> None:
    """Compares the tokenizer that the config asks for with that of a corpus that was prepared earlier."""
    asked, found = config.data.tokenizer, corpus.tokenizer
    if asked not in ("bpe", "byte"):
        found_is_asked = load_tokenizer(asked).fingerprint == found.fingerprint
    else:
        found_is_asked = asked == found.kind and (asked == "byte" or config.data.vocab_size == found.vocab_size)
    if not found_is_asked:
        size = f" with data.vocab_size = {config.data.vocab_size}" if asked == "bpe" else ""
        raise UserError(
            f"data.tokenizer = {asked!r}{size} does not match the corpus {corpus.folder}, which was prepared with "
            f"{found.kind!r} of {found.vocab_size} entries; set these fields to match, or prepare the text again."
        )
