"""The files of one split: ArrayRecord shards of its documents, their lengths and their ids."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordWriter

from natsjax.data.corpus import IDS_FILE, LENGTHS_FILE, SplitSummary, record_dtype, shard_name

# Grain reads single records: a group of one keeps a random read from decompressing its neighbors.
_WRITER_OPTIONS = "group_size:1"


class SplitWriter:
    """Writer of the documents of a split; a context manager that completes the files on leaving.

    Args:
      folder: the split's folder, made here.
      vocab_size: decides the type that token ids are stored in.
      documents_per_shard: documents in a shard file; the last shard may hold fewer.

    Raises:
      OSError: the folder cannot be written, for example because the disk is full.
    """

    def __init__(self, folder: Path, *, vocab_size: int, documents_per_shard: int):
        self._folder = folder
        self._dtype = record_dtype(vocab_size)
        self._documents_per_shard = documents_per_shard
        self._lengths = array("q")
        self._bytes = 0
        self._shards = 0
        self._hash = hashlib.sha256()
        self._shard: ArrayRecordWriter | None = None
        folder.mkdir()
        self._ids = (folder / IDS_FILE).open("w", encoding="utf-8")

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            with _as_os_error():
                self._close_shard()
            np.save(self._folder / LENGTHS_FILE, np.array(self._lengths, np.int64))
        self._ids.close()

    def add(self, document_id: str, tokens: npt.NDArray[np.int32], num_bytes: int) -> None:
        """Appends one document: its id, int32 ``[num_tokens]`` without BOS and EOS, and the bytes of its text."""
        with _as_os_error():
            if self._shard is None or len(self._lengths) % self._documents_per_shard == 0:
                self._close_shard()
                self._shard = self._open_shard()
            self._shard.write(tokens.astype(self._dtype).tobytes())
        self._ids.write(json.dumps(document_id) + "\n")
        self._lengths.append(len(tokens))
        self._bytes += num_bytes
        # Lengths keep ("ab", "c") and ("a", "bc") apart; int32 keeps the hash free of the storage type.
        identity = document_id.encode("utf-8")
        self._hash.update(np.array([len(identity), len(tokens)], "<i8").tobytes() + identity)
        self._hash.update(tokens.astype("<i4").tobytes())

    @property
    def summary(self) -> SplitSummary:
        """Counts so far."""
        return SplitSummary(len(self._lengths), sum(self._lengths), self._bytes, self._shards)

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the ids and tokens so far, in order, whatever their shards."""
        return self._hash.hexdigest()

    def _open_shard(self) -> ArrayRecordWriter:
        from array_record.python.array_record_module import ArrayRecordWriter  # slow to import

        shard = ArrayRecordWriter(str(self._folder / shard_name(self._shards)), _WRITER_OPTIONS)
        self._shards += 1
        return shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = None


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raises OSError for RuntimeError, as which array_record's C++ side reports everything, a full disk included."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
