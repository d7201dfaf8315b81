"""The data that a config names: a prepared corpus (made when it is not there yet) or the recall task."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from natsjax.config import Config
from natsjax.data import (
    Corpus,
    PackedSource,
    RecallTask,
    Row,
    RowSource,
    Tokenizer,
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

    An export may be far from its corpus: then ``vocabulary``, ``description`` and ``fingerprint`` are those of the run
    that it came from, ``piece_lengths`` is empty, and asking for rows or contexts raises a ``UserError``.

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


def open_data(
    config: Config, workdir: Workdir, *, prepared_dir: str | os.PathLike[str] | None = None, progress: bool = True
) -> RunData:
    """Opens the data, preparing the corpus first where needed.

    Args:
      config: of the run.
      workdir: of the run, or an export.
      prepared_dir: where the prepared corpus lies by now; None: where ``config`` says.
      progress: show progress.

    Raises:
      UserError: see ``natsjax.data.prepare``, ``natsjax.data.Corpus`` and ``natsjax.data.RecallTask``.
    """
    if config.data.source == "recall":
        if prepared_dir is not None:
            raise UserError(
                f"--prepared_dir={os.fspath(prepared_dir)}: {workdir.path} is a recall run, without corpus."
            )
        return _open_recall(config)
    if prepared_dir is not None:
        return _of_corpus(config, Corpus.load(prepared_dir))
    if workdir.is_export:
        return _open_export(config, workdir)
    return _of_corpus(config, _find_corpus(config, workdir, progress))


def open_vocabulary(config: Config, workdir: Workdir) -> Vocabulary:
    """The tokens of a run or an export, without the text.

    Raises:
      UserError: the tokenizer is not there.
    """
    if config.data.source == "recall":
        return _recall_task(config)
    if workdir.is_export:
        return load_tokenizer(workdir.tokenizer)
    return Corpus.load(config.data.prepared_dir or workdir.corpus).tokenizer


def token_meaning(vocabulary: Vocabulary) -> str:
    """For people; the same for two vocabularies if and only if each id stands for the same in both."""
    if isinstance(vocabulary, RecallTask):
        task = vocabulary
        return f"recall of {task.num_keys} keys, {task.num_values} values and {task.num_fillers} fillers"
    if isinstance(vocabulary, Tokenizer):
        return f"{vocabulary.kind} of {vocabulary.vocab_size}, fingerprint {vocabulary.fingerprint}"
    raise TypeError(type(vocabulary))


def _recall_task(config: Config) -> RecallTask:
    return RecallTask(config.data.context_length, seed=config.train.seed, **dataclasses.asdict(config.data.recall))


def _open_recall(config: Config) -> RunData:
    task = _recall_task(config)
    return RunData(
        vocabulary=task,
        source=task,
        contexts=lambda split, count: task.rows(0, count, split=split),
        piece_lengths=np.array([task.context_length]),
        description=f"associative recall of {task.num_pairs} pairs in {task.context_length} tokens",
        fingerprint=hashlib.sha256(json.dumps(dataclasses.asdict(task)).encode()).hexdigest(),
    )


def _open_export(config: Config, workdir: Workdir) -> RunData:
    """The corpus where it still is, else the tokenizer alone."""
    fingerprint = workdir.read_data_fingerprint()
    try:
        corpus = Corpus.load(config.data.prepared_dir)
        if corpus.content_hash == fingerprint:
            return _of_corpus(config, corpus)
        why = f"what {corpus.folder} holds is another one"
    except UserError:
        why = f"{config.data.prepared_dir} holds none"

    def refuse(*_) -> NoReturn:
        raise UserError(
            f"the corpus that {workdir.path} was trained on is not here ({why}); give its folder as --prepared_dir."
        )

    class Nothing:
        rows = __getitem__ = refuse

    return RunData(
        vocabulary=load_tokenizer(workdir.tokenizer),
        source=Nothing(),
        contexts=refuse,
        piece_lengths=np.zeros(0, np.int64),
        description=workdir.read_export()["data"],
        fingerprint=fingerprint,
    )


def _find_corpus(config: Config, workdir: Workdir, progress: bool) -> Corpus:
    data = config.data
    folder = data.prepared_dir or workdir.corpus
    # A run that has begun goes on with the corpus that it has, wherever the text is by now; a prepared_dir that holds a
    # corpus is what the user means by it.
    known = data.prepared_dir or workdir.has_checkpoint() or not data.input
    if known and ((pathlib.Path(folder) / CORPUS_FILE).exists() or not data.input):
        corpus = Corpus.load(folder)
        _check_tokenizer(config, corpus)
        return corpus
    # Here, because Python warns of a command (python -m natsjax.data.prepare) that `import natsjax` has imported.
    from natsjax.data.prepare import prepare

    return prepare(
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


def _of_corpus(config: Config, corpus: Corpus) -> RunData:
    data = config.data
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
            f"{data.input or corpus.folder}, {counts.documents} documents, {counts.tokens / 1e6:.2f}M tokens, "
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
