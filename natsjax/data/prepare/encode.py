"""The last pass of ``prepare`` over the text: documents to token ids, in chunks that are kept as they are done.

A chunk is a run of consecutive documents of an input with about ``CHUNK_BYTES`` of text. Where chunks begin depends on
the text alone, so that whoever resumes the work, with however many processes, finds the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from natsjax.data.corpus import record_dtype
from natsjax.data.prepare.parts import read_part, write_part
from natsjax.data.prepare.scan import DROPPED, Scan, changed_error, documents_from
from natsjax.data.readers.corpus_reader import CorpusReader, Document
from natsjax.data.tokenizers import Tokenizer

CHUNK_BYTES = 1 << 22

_DOCUMENT_BYTES = 64  # what a document costs beside its text: chunks of very short ones must not grow
# Documents are encoded together, on all cores where the tokenizer can, until this many characters are collected.
_BATCH_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Chunk:
    """Documents ``begin … end-1`` of an input, counted over all its sources.

    Attributes:
      name: unique; its part is called so.
      input: name of the input.
      begin: number of the first document.
      end: number after the last document.
      kept: bool ``[end - begin]``, which of them go into the corpus.
      num_bytes: size of the text of these.
    """

    name: str
    input: str
    begin: int
    end: int
    kept: npt.NDArray[np.bool_]
    num_bytes: int


def chunks_of(input: str, scan: Scan, splits: npt.NDArray[np.int8], chunk_bytes: int) -> list[Chunk]:
    """Divides an input into chunks, in order; they hold all documents but for dropped ones at its end."""
    kept = splits != DROPPED
    sizes = np.where(kept, scan.sizes, 0)
    costs = np.where(kept, sizes + _DOCUMENT_BYTES, 0)
    before = np.cumsum(costs) - costs
    documents = np.flatnonzero(kept)
    if not len(documents):
        return []
    numbers = before[documents] // chunk_bytes
    starts = documents[np.flatnonzero(np.diff(numbers, prepend=-1))]
    ends = [*starts[1:], documents[-1] + 1]
    return [
        Chunk(
            name=f"{input}-{number:06d}",
            input=input,
            begin=int(begin),
            end=int(end),
            kept=kept[begin:end],
            num_bytes=int(sizes[begin:end].sum()),
        )
        for number, (begin, end) in enumerate(zip(starts, ends, strict=True))
    ]


def stretches(chunks: Sequence[Chunk], scans: dict[str, Scan], workers: int) -> list[list[Chunk]]:
    """Returns runs of chunks, each to be encoded by one process, chunk by chunk.

    A process that begins in the middle of a source has to read what comes before. So a source is begun by at most
    as many processes as there are.
    """
    ends = {name: np.cumsum(scan.counts) for name, scan in scans.items()}

    def source(chunk: Chunk) -> tuple[str, int]:
        return chunk.input, int(np.searchsorted(ends[chunk.input], chunk.begin, side="right"))

    found = []
    for _, group in groupby(chunks, source):
        together = list(group)
        size = -(-len(together) // workers)
        found += [together[begin : begin + size] for begin in range(0, len(together), size)]
    return found


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks and writes each to a part.

    Attributes:
      readers: of the inputs; files that were skipped must hold no document in ``counts``.
      counts: by input, int64 ``[num_sources]``, documents in each source.
      tokenizer: what with.
      folder: where the parts go.
    """

    readers: dict[str, CorpusReader]
    counts: dict[str, npt.NDArray[np.int64]]
    tokenizer: Tokenizer
    folder: Path

    def encode(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """Encodes chunks of one input, in order; yields each when its part is written."""
        reader = self.readers[chunks[0].input]
        place = chunks[0].begin
        documents = documents_from(reader, self.counts[chunks[0].input], place)
        for chunk in chunks:
            for _ in islice(documents, chunk.begin - place):
                pass  # in a chunk that was done before
            mine = islice(documents, chunk.end - chunk.begin)
            wanted = (document for document, keep in zip(mine, chunk.kept, strict=True) if keep)
            arrays = self._encoded(wanted)
            if int(arrays["num_bytes"].sum()) != chunk.num_bytes:
                before = f"documents {chunk.begin} to {chunk.end} held {chunk.num_bytes} bytes before"
                raise changed_error(reader, before)
            write_part(self.folder / f"{chunk.name}.npz", arrays)
            place = chunk.end
            yield chunk

    def _encoded(self, documents: Iterable[Document]) -> dict[str, np.ndarray]:
        dtype = record_dtype(self.tokenizer.vocab_size)
        tokens, sizes, ids = [np.zeros(0, dtype)], [], []
        lengths: list[int] = []
        for batch in _batches(documents):
            encoded = self.tokenizer.encode_batch([document.text for document in batch])
            tokens += [array.astype(dtype) for array in encoded]
            lengths += [len(array) for array in encoded]
            sizes += [len(document.text.encode("utf-8")) for document in batch]
            ids += [document.id for document in batch]
        return {
            "tokens": np.concatenate(tokens),
            "lengths": np.array(lengths, np.int64),
            "num_bytes": np.array(sizes, np.int64),
            "ids": np.frombuffer(json.dumps(ids).encode(), np.uint8),
        }


def read_encoded(path: Path) -> Iterator[tuple[str, npt.NDArray[np.int32], int]]:
    """Yields id, tokens (int32 ``[num_tokens]``) and bytes of each document of a part."""
    part = read_part(path)
    ids = json.loads(part["ids"].tobytes())
    tokens = part["tokens"].astype(np.int32)
    ends = np.cumsum(part["lengths"])
    for name, begin, end, size in zip(ids, ends - part["lengths"], ends, part["num_bytes"], strict=True):
        yield name, tokens[begin:end], int(size)


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
