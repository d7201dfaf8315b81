"""The passes of ``prepare`` over the text, by one process or several, each resuming from the parts that are done."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from natsjax.data.prepare.encode import CHUNK_BYTES, Chunk, Encoder, chunks_of, stretches
from natsjax.data.prepare.parts import PartialFolder, read_part, write_part
from natsjax.data.prepare.request import PrepareRequest
from natsjax.data.prepare.scan import DROPPED, TRAIN, VALIDATION, Scan, divide, documents_from, source_groups
from natsjax.data.prepare.worker_pool import WorkerPool, finished
from natsjax.data.readers.corpus_reader import CorpusReader
from natsjax.data.readers.input_report import report_lines
from natsjax.data.tokenizers import BPETokenizer, Tokenizer, load_tokenizer
from natsjax.runtime.files import write_file
from natsjax.runtime.log import logger
from natsjax.runtime.progress import Progress

# With less text than this, starting processes (each imports natsjax) takes longer than they save.
PARALLEL_BYTES = 1 << 26

_POLL_SECONDS = 0.5
_TOKENIZER_FOLDER = "tokenizer"
_SETUP_FILE = "encoding.pickle"

Splits = dict[str, npt.NDArray[np.int8]]


class Preparation:
    """The work of ``prepare`` before it writes the corpus; processes that it starts end with ``processes``.

    Attributes:
      reports: by input, what became of everything in it (``readers.input_report``); there once it is scanned.
    """

    def __init__(
        self, request: PrepareRequest, readers: dict[str, CorpusReader], partial: PartialFolder, processes: ExitStack
    ):
        self._request = request
        self._readers = readers
        self._partial = partial
        self._processes = processes
        self._pool: WorkerPool | None = None
        self.reports: dict[str, dict[str, Any]] = {}
        # What was found bad holds no document in the scan and is not opened again: later passes need no check of it.
        self._plain_readers = {name: reader.plain() for name, reader in readers.items()}

    def scan(self) -> dict[str, Scan]:
        """Reads everything once, so that bad input is found before any long work."""
        is_much = sum(reader.size_on_disk for reader in self._readers.values()) >= PARALLEL_BYTES
        scans = {}
        for name, reader in self._readers.items():
            groups = source_groups(reader.num_sources)
            with Progress(f"Reading {name}", shown=self._request.progress) as progress:
                found = []
                for scan in self._scans(name, groups, is_much=is_much):
                    found.append(scan)
                    progress.add(len(scan.sizes), int(scan.sizes.sum()))
            scans[name] = Scan.joined(found)
            self.reports[name] = scans[name].report(reader)
        if list(scans) == ["input"] and scans["input"].is_one_text:
            scans["input"] = self._hold_out_end(scans["input"])
        for name, reader in self._readers.items():
            lines = report_lines(reader.input, self.reports[name])
            logger.log(logging.INFO if len(lines) == 1 else logging.WARNING, "%s", "\n".join(lines))
        return scans

    def divide(self, scans: dict[str, Scan]) -> tuple[Splits, int]:
        """Divides documents among the splits and counts duplicates, as ``scan.divide`` does."""
        if "held_out_end" in self.reports["input"]:  # of the first document; the others are its copies
            places = np.full(len(scans["input"].sizes), DROPPED, np.int8)
            places[:2] = TRAIN, VALIDATION
            return {"input": places}, len(places) // 2 - 1
        return divide(scans, fraction=self._request.held_out_fraction, deduplicate=self._request.deduplicate)

    def tokenizer(self, scans: dict[str, Scan], splits: Splits) -> Tokenizer:
        """Returns the tokenizer: the one asked for, or one that is trained on the training documents.

        It is also written to the partial folder, where a later process finds it.
        """
        folder = self._partial.path / _TOKENIZER_FOLDER
        if folder.exists():
            return load_tokenizer(folder)
        tokenizer = self._request.existing_tokenizer or self._train_bpe(scans["input"], splits["input"])
        unfinished = folder.with_name(f"{_TOKENIZER_FOLDER}.unfinished-folder")
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save(unfinished)
        unfinished.rename(folder)
        return tokenizer

    def encode(self, scans: dict[str, Scan], splits: Splits, tokenizer: Tokenizer) -> list[Chunk]:
        """Encodes all documents; returns the chunks, whose parts are there then."""
        chunks = [chunk for name, scan in scans.items() for chunk in chunks_of(name, scan, splits[name], CHUNK_BYTES)]
        missing = [chunk for chunk in chunks if not self._partial.part(chunk.name).exists()]
        if len(missing) < len(chunks):
            logger.info("%d of %d chunks are encoded already", len(chunks) - len(missing), len(chunks))
        workers = min(self._request.num_workers, len(missing))
        total = totals(missing)
        with Progress("Encoding", shown=self._request.progress, **total) as progress:
            if workers > 1 and total["num_bytes"] >= PARALLEL_BYTES:
                done = self._encode_in_pool(missing, scans, workers)
            else:
                counts = {name: scan.counts for name, scan in scans.items()}
                encoder = Encoder(self._plain_readers, counts, tokenizer, self._partial.path)
                done = (chunk for stretch in stretches(missing, scans, 1) for chunk in encoder.encode(stretch))
            for chunk in done:
                progress.add(int(chunk.kept.sum()), chunk.num_bytes)
        return chunks

    def _scans(self, name: str, groups: Sequence[range], *, is_much: bool) -> Iterator[Scan]:
        request = self._request
        how: dict[str, Any] = {"seed": request.seed, "with_digests": request.deduplicate}

        def scan_here(group: range) -> Scan:
            return Scan.of(self._readers[name], group, **how)

        if not is_much:
            yield from map(scan_here, groups)
            return
        parts = [self._partial.part(f"scan-{name}-{number:04d}") for number in range(len(groups))]
        missing = [(group, part) for group, part in zip(groups, parts, strict=True) if not part.exists()]
        futures = {}
        if min(request.num_workers, len(missing)) > 1:
            tasks = self._workers().submit(bind(_scan_to_part, name=name, **how), missing)
            futures = {part: future for (_, part), future in zip(missing, tasks, strict=True)}
        for group, part in zip(groups, parts, strict=True):
            if part in futures:
                for _ in finished([futures[part]], _POLL_SECONDS):
                    pass  # waits in steps, between which an interruption is heard
            elif not part.exists():
                write_part(part, scan_here(group).to_arrays())
                yield Scan.from_arrays(read_part(part))
                continue
            scan = Scan.from_arrays(read_part(part))
            for reason in scan.skipped.values():
                logger.warning("Skipped: %s", reason)
            yield scan

    def _hold_out_end(self, scan: Scan) -> Scan:
        """Returns the scan of an input with one document as if it were two: its end is held out."""
        request, reader = self._request, self._readers["input"]
        document = next(documents_from(self._plain_readers["input"], scan.counts, 0)).id
        self._plain_readers["input"] = cut = reader.plain(held_out_end=request.held_out_fraction)
        scan = scan.with_end_held_out(cut)
        self.reports["input"]["held_out_end"] = {
            "document": document,
            "bytes": int(scan.sizes[:2].sum()),
            "held_out_bytes": int(scan.sizes[1]),
        }
        return scan

    def _train_bpe(self, scan: Scan, split: npt.NDArray[np.int8]) -> BPETokenizer:
        wanted, is_train = self._request.vocab_size, split == TRAIN
        total = {"documents": int(is_train.sum()), "num_bytes": int(scan.sizes[is_train].sum())}
        with Progress("Training the tokenizer", shown=self._request.progress, **total) as progress:

            def texts() -> Iterator[str]:
                documents = documents_from(self._plain_readers["input"], scan.counts, 0)
                for place, document in enumerate(documents):
                    if is_train[place]:
                        progress.add(1, int(scan.sizes[place]))
                        yield document.text

            tokenizer = BPETokenizer.train(texts(), wanted)
        if (found := tokenizer.vocab_size) < wanted:
            logger.warning("The text gave a vocabulary of only %d of the %d ids asked for", found, wanted)
        return tokenizer

    def _encode_in_pool(self, missing: Sequence[Chunk], scans: dict[str, Scan], workers: int) -> Iterator[Chunk]:
        folder = self._partial.path
        setup = (self._plain_readers, {name: scan.counts for name, scan in scans.items()})
        # In a file and not in each task: there may be millions of files.
        write_file(folder / _SETUP_FILE, lambda file: pickle.dump(setup, file))
        waiting = {self._partial.part(chunk.name).name: chunk for chunk in missing}
        futures = self._workers().submit(bind(_encode_to_parts, folder=folder), stretches(missing, scans, workers))
        for _ in finished(futures, _POLL_SECONDS):
            for name in waiting.keys() & set(os.listdir(folder)):
                yield waiting.pop(name)

    def _workers(self) -> WorkerPool:
        """Returns the processes, started when there is work for them, and kept for all passes."""
        if self._pool is None:
            self._pool = self._processes.enter_context(WorkerPool(self._request.num_workers, _start, (self._readers,)))
        return self._pool


def totals(chunks: Iterable[Chunk]) -> dict[str, int]:
    """Counts the documents and bytes of chunks, as ``Progress`` takes them."""
    chunks = list(chunks)
    return {
        "documents": sum(int(chunk.kept.sum()) for chunk in chunks),
        "num_bytes": sum(chunk.num_bytes for chunk in chunks),
    }


# What a worker process works with: tasks name only what differs between them.
_readers: dict[str, CorpusReader]


def _start(readers: dict[str, CorpusReader]) -> None:
    global _readers
    _readers = readers


def _scan_to_part(task: tuple[range, Path], *, name: str, seed: int, with_digests: bool) -> None:
    group, part = task
    write_part(part, Scan.of(_readers[name], group, seed=seed, with_digests=with_digests).to_arrays())


@functools.cache
def _encoder(folder: Path) -> Encoder:
    readers, counts = pickle.loads((folder / _SETUP_FILE).read_bytes())
    return Encoder(readers, counts, load_tokenizer(folder / _TOKENIZER_FOLDER), folder)


def _encode_to_parts(chunks: Sequence[Chunk], *, folder: Path) -> None:
    for _ in _encoder(folder).encode(chunks):
        pass
