"""The data that a config names: a prepared corpus (made when it is not there yet) or the recall task."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NoReturn

import numpy as np

from natsjax.config import Config
from natsjax.config_fields import LARGEST_INT
from natsjax.data import (
    Corpus,
    Documents,
    PackedSource,
    RecallTask,
    Row,
    RowSource,
    Tokenizer,
    Vocabulary,
    evaluation_contexts,
    is_tokenizer_of,
    load_tokenizer,
)
from natsjax.data.corpus import CORPUS_FILE
from natsjax.data.mixture import (
    MixtureSource,
    Part,
    load_mixture,
    mixture_contexts,
    mixture_fingerprint,
    mixture_name,
)
from natsjax.errors import UserError
from natsjax.runs.paths import check_moved_text, locate
from natsjax.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class RunData:
    """Data that a run learns from and is measured on.

    An export may be far from its corpus: then ``vocabulary``, ``description`` and ``fingerprint`` are those of the run
    that it came from, ``piece_lengths`` is empty, and asking for rows or contexts raises a ``UserError``.

    Attributes:
      vocabulary: the tokens.
      source: training contexts by index.
      contexts: ``contexts(split, max_contexts)`` is a fixed slice of "train" or "validation", arrays ``[n, t]``.
      piece_lengths: int ``[num_pieces]``, tokens in each document piece of an epoch of training contexts.
      description: for people.
      fingerprint: SHA-256 (hex); other data has another one.
      epoch_tokens: tokens of an epoch, BOS and EOS among them (of a mixture: of all corpora together, each once); None
        where there are no epochs.
      training_documents: opens the documents of the training split, of each corpus; None where there are none.
    """

    vocabulary: Vocabulary
    source: RowSource
    contexts: Callable[[str, int], Row]
    piece_lengths: np.ndarray
    description: str
    fingerprint: str
    epoch_tokens: int | None = None
    training_documents: Callable[[], Sequence[Documents]] | None = None


def open_data(config: Config, workdir: Workdir, *, progress: bool = True) -> RunData:
    """Opens the data to train on, preparing the corpus first where needed.

    Args:
      config: of the run.
      workdir: of the run.
      progress: show progress.

    Raises:
      UserError: see ``natsjax.data.prepare``, ``natsjax.data.Corpus`` and ``natsjax.data.RecallTask``.
    """
    if config.data.source == "recall":
        return _open_recall(config)
    if config.data.source == "none":
        raise UserError(
            'data.source = "none": there is nothing to train on (it is of imported models); name data.input, '
            "data.prepared_dir or data.mixture, and the imported model as train.init_from."
        )
    if config.data.mixture:
        return _of_mixture(config, load_mixture(config.data.mixture))
    return _of_corpus(config, _find_corpus(config, workdir, progress))


def find_data(config: Config, workdir: Workdir, *, prepared_dir: str | os.PathLike[str] | None = None) -> RunData:
    """Opens the data that a run was trained on, wherever it is by now; prepares and writes nothing.

    Args:
      config: of the run.
      workdir: of the run, or an export.
      prepared_dir: where the prepared corpus is now, or ``DIR=WEIGHT,DIR=WEIGHT`` where the corpora of a mixture
        do; None: as ``natsjax.runs.paths`` finds it.

    Raises:
      UserError: it is not there, or damaged.
    """
    if config.data.source == "recall":
        if prepared_dir is not None:
            raise UserError(
                f"--prepared_dir={os.fspath(prepared_dir)}: {workdir.path} is a recall run, without corpus."
            )
        return _open_recall(config)
    if config.data.source == "none":
        return _of_imported(config, workdir, prepared_dir)
    if prepared_dir is not None:
        return _of_prepared(config, os.fspath(prepared_dir))
    try:
        data = locate(config.data, workdir.path, workdir.known_fingerprint())
    except UserError as error:
        if not workdir.is_export:
            raise
        return _without_corpus(workdir, error)
    config = dataclasses.replace(config, data=data)
    return _of_mixture(config, load_mixture(data.mixture)) if data.mixture else _of_corpus(config, _load(config))


def _of_imported(config: Config, workdir: Workdir, prepared_dir: str | os.PathLike[str] | None) -> RunData:
    """Returns the data of an imported model: any corpus of its tokens, or the tokenizer alone."""
    if prepared_dir is None:
        how = f"python -m natsjax.data.prepare --tokenizer={workdir.tokenizer}"
        missing = (
            f"{workdir.path} was imported and has no corpus of its own; prepare text with its tokenizer ({how} …) "
        )
        return _without_corpus(workdir, UserError(f"{missing}and give its folder as --prepared_dir."))
    found, ours = _of_prepared(config, os.fspath(prepared_dir)), load_tokenizer(workdir.tokenizer)
    if token_meaning(found.vocabulary) != token_meaning(ours):
        raise UserError(
            f"--prepared_dir={os.fspath(prepared_dir)} has other tokens ({token_meaning(found.vocabulary)}) than "
            f"{workdir.path} ({token_meaning(ours)}); prepare the text with --tokenizer={workdir.tokenizer}."
        )
    return found


def open_vocabulary(config: Config, workdir: Workdir) -> Vocabulary:
    """Returns the vocabulary of a run or an export, without its text.

    Raises:
      UserError: the tokenizer is not there.
    """
    if config.data.source == "recall":
        return _recall_task(config)
    if workdir.is_export:
        return load_tokenizer(workdir.tokenizer)
    remedy = "export that run where its corpus is (python -m natsjax.export), and name the export instead"
    data = locate(config.data, workdir.path, workdir.known_fingerprint(), remedy=remedy)
    return load_mixture(data.mixture)[0].corpus.tokenizer if data.mixture else Corpus.load(data.prepared_dir).tokenizer


def token_meaning(vocabulary: Vocabulary) -> str:
    """Describes a vocabulary; two have the same text if and only if each id means the same in both."""
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


def _without_corpus(workdir: Workdir, error: UserError) -> RunData:
    """Returns the data of an export that is far from its corpus: the tokenizer alone."""

    def refuse(*_) -> NoReturn:
        raise error

    class Nothing:
        rows = __getitem__ = refuse

    return RunData(
        vocabulary=load_tokenizer(workdir.tokenizer),
        source=Nothing(),
        contexts=refuse,
        piece_lengths=np.zeros(0, np.int64),
        description=workdir.read_export()["data"],
        fingerprint=workdir.read_data_fingerprint(),
    )


def _find_corpus(config: Config, workdir: Workdir, progress: bool) -> Corpus:
    data = config.data
    folder = data.prepared_dir or workdir.corpus
    # A run that has begun keeps the corpus that it has, wherever the text is by now; a prepared_dir that holds a
    # corpus is what the user means by it.
    known = data.prepared_dir or workdir.has_checkpoint() or not data.input
    if known and (_is_corpus(folder) or not data.input):
        corpus = Corpus.load(folder)
        _check_tokenizer(config, workdir, corpus)
        check_moved_text(config, workdir, corpus)
        return corpus
    # Here, because Python warns of a command (python -m natsjax.data.prepare) that `import natsjax` has imported.
    from natsjax.data.prepare import prepare

    return prepare(
        data.input,
        folder,
        tokenizer=data.tokenizer,
        tiktoken_pattern=data.tiktoken_pattern,
        vocab_size=data.vocab_size,
        held_out_fraction=data.held_out_fraction,
        validation_input=data.validation_input,
        text_field=data.text_field,
        skip_bad_files=data.skip_bad_files,
        deduplicate=data.deduplicate,
        progress=progress,
    )


def _of_prepared(config: Config, where: str) -> RunData:
    """Opens a prepared corpus, or a mixture of some."""
    folder = os.path.expanduser(where)
    if not _is_corpus(folder) and "=" in where:
        return _of_mixture(config, load_mixture(where))
    return _of_corpus(config, Corpus.load(folder))


def _is_corpus(folder: str | os.PathLike[str]) -> bool:
    return os.path.exists(pathlib.Path(folder) / CORPUS_FILE)


def _load(config: Config) -> Corpus:
    return Corpus.load(config.data.prepared_dir)


def _of_mixture(config: Config, parts: list[Part]) -> RunData:
    length = config.data.context_length
    source = MixtureSource(parts, context_length=length, seed=config.train.seed, shuffle=config.data.shuffle)
    tokenizer = parts[0].corpus.tokenizer
    return RunData(
        vocabulary=tokenizer,
        source=source,
        piece_lengths=source.piece_lengths(),
        contexts=lambda split, count: mixture_contexts(parts, split, context_length=length, max_contexts=count),
        description=f"{mixture_name(parts)}, {tokenizer.kind} tokenizer of {tokenizer.vocab_size}",
        fingerprint=mixture_fingerprint((part.corpus.content_hash, part.fraction) for part in parts),
        epoch_tokens=source.epoch_tokens,
        training_documents=lambda: [part.corpus.documents("train") for part in parts],
    )


def resolve_length(config: Config, data: RunData) -> Config:
    """Returns the config with ``train.num_steps`` from ``train.num_tokens`` or ``train.num_epochs``, where one is set.

    Raises:
      UserError: the data has no epochs, or the run is shorter than its warm-up.
    """
    train = config.train
    if not train.num_tokens and not train.num_epochs:
        return config
    per_step = train.batch_size * config.data.context_length
    if train.num_tokens:
        asked, tokens = f"train.num_tokens = {train.num_tokens}", Fraction(train.num_tokens)
    elif data.epoch_tokens is None:
        raise UserError(
            f"train.num_epochs = {train.num_epochs:g}: {data.description} has no epochs; give train.num_steps or "
            "train.num_tokens."
        )
    else:
        # 0.1 as it is written, which is not quite what a float of it is.
        asked, tokens = f"train.num_epochs = {train.num_epochs:g}", Fraction(repr(train.num_epochs)) * data.epoch_tokens
    num_steps = max(1, math.ceil(tokens / per_step))
    if num_steps > LARGEST_INT:
        raise UserError(f"{asked} makes {num_steps} steps; at most {LARGEST_INT} can be counted.")
    if config.optimizer.warmup_steps > num_steps:
        raise UserError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than the {num_steps} steps that {asked} "
            f"makes in batches of {per_step} tokens."
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, num_steps=num_steps))


def length_of_run(config: Config, data: RunData) -> str:
    """Describes the tokens and epochs of a run; ``train.num_steps`` is resolved."""
    tokens = config.train.num_steps * config.train.batch_size * config.data.context_length
    text = f"{config.train.num_steps:,} steps, {tokens:,} tokens"
    if data.epoch_tokens is None:
        return text
    text += f", {tokens / data.epoch_tokens:.3g} epochs"
    if isinstance(data.source, MixtureSource):
        parts = zip(data.source.parts, data.source.sources, strict=True)
        own = [f"{part.fraction * tokens / source.epoch_tokens:.3g} of {part.corpus.folder}" for part, source in parts]
        text += f" ({', '.join(own)})"
    return text


def _of_corpus(config: Config, corpus: Corpus) -> RunData:
    data = config.data
    counts = corpus.summaries["train"]
    source = PackedSource.from_corpus(
        corpus, context_length=data.context_length, seed=config.train.seed, shuffle=data.shuffle
    )
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
        epoch_tokens=source.epoch_tokens,
        training_documents=lambda: [corpus.documents("train")],
    )


def _check_tokenizer(config: Config, workdir: Workdir, corpus: Corpus) -> None:
    """Compares the tokenizer that the config asks for with that of a corpus that was prepared earlier."""
    asked, found = config.data.tokenizer, corpus.tokenizer
    if asked not in ("bpe", "byte"):
        if workdir.has_checkpoint() and not os.path.exists(asked):
            return  # it was moved away after it had been compared; the corpus has a copy
        found_is_asked = is_tokenizer_of(asked, found, tiktoken_pattern=config.data.tiktoken_pattern)
    else:
        found_is_asked = asked == found.kind and (asked == "byte" or config.data.vocab_size == found.vocab_size)
    if not found_is_asked:
        size = f" with data.vocab_size = {config.data.vocab_size}" if asked == "bpe" else ""
        raise UserError(
            f"data.tokenizer = {asked!r}{size} does not match the corpus {corpus.folder}, which was prepared with "
            f"{found.kind!r} of {found.vocab_size} entries; set these fields to match, or prepare the text again."
        )
