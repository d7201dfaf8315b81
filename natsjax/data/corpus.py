"""A prepared corpus on disk.

    DIR/corpus.json                 description: format, tokenizer, counts, content hash, arguments
    DIR/tokenizer/                  the tokenizer (``natsjax.data.tokenizers.load_tokenizer``)
    DIR/SPLIT/00000.arrayrecord …   a record for each document: its token ids without BOS and EOS, little-endian
                                    uint16, or uint32 for a vocabulary of more than 65,536 ids
    DIR/SPLIT/lengths.npy           int64 [num_documents], tokens in each document
    DIR/SPLIT/document_ids.ndjson   the documents' ids in the same order, a JSON string per line

with SPLIT ``train`` or ``validation``. Lengths and ids are not in corpus.json, which stays small enough to read, and a
run can compute its stream from the lengths without opening a shard.

A damaged file is noticed when it is read: shards have their own checksums, and corpus.json has those of the tokenizer,
the lengths and the ids.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from natsjax.config_fields import check_file_name
from natsjax.data.readers.file_marks import check_file_no_pointer, check_no_pointer
from natsjax.data.tokenizers import Tokenizer, load_tokenizer
from natsjax.errors import UserError, first_line
from natsjax.runtime import checksums

FORMAT_VERSION = 1
SPLITS = ("train", "validation")

CORPUS_FILE = "corpus.json"
TOKENIZER_FOLDER = "tokenizer"
LENGTHS_FILE = "lengths.npy"
IDS_FILE = "document_ids.ndjson"


def shard_name(number: int) -> str:
    """Returns the file name of a split's shard."""
    return f"{number:05d}.arrayrecord"


def record_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype that token ids are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class SplitSummary:
    """The counts of one split.

    Attributes:
      documents: number of documents.
      tokens: number of tokens, BOS and EOS not counted.
      bytes: size of the text in UTF-8.
      shards: number of ArrayRecord files.
    """

    documents: int
    tokens: int
    bytes: int
    shards: int

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes that a token stands for."""
        return self.bytes / self.tokens

    def to_json(self) -> dict[str, int | float]:
        """Returns the counts with ``bytes_per_token``, for corpus.json."""
        return dataclasses.asdict(self) | {"bytes_per_token": round(self.bytes_per_token, 4)}

    @classmethod
    def from_json(cls, counts: Mapping[str, Any]) -> SplitSummary:
        """Builds the counts from the result of ``to_json``; raises KeyError where one is missing."""
        return cls(**{field.name: counts[field.name] for field in dataclasses.fields(cls)})


class Documents:
    """The tokenized documents of one split, by index; threads may share it, and it can be pickled.

    Attributes:
      lengths: int64 ``[num_documents]``, tokens in each document, without BOS and EOS.

    Args:
      folder: the split's folder.
      summary: counts in corpus.json.
      dtype: dtype of stored token ids.
      sums: SHA-256 (hex) of the lengths and the ids, by file name; an older corpus has none.

    Raises:
      UserError: a file is missing or damaged, or does not fit the counts; also when a document is read.
    """

    def __init__(self, folder: Path, summary: SplitSummary, dtype: np.dtype, sums: Mapping[str, str]):
        self._folder = folder
        self._dtype = dtype
        self._sums = sums
        shards = [folder / shard_name(number) for number in range(summary.shards)]
        for path in (folder / LENGTHS_FILE, *shards):
            check_file_no_pointer(path)
        try:
            self.lengths: npt.NDArray[np.int64] = np.load(folder / LENGTHS_FILE)
        except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # the header is Python
            raise _damaged(f"{folder / LENGTHS_FILE} cannot be read ({first_line(error)})") from error
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow to import

            self._records = ArrayRecordDataSource(shards)
        except (RuntimeError, ValueError) as error:  # of array_record's C++ side; no shards at all
            raise _damaged(f"a shard of {folder} cannot be read ({first_line(error)})") from error
        if not len(self._records) == len(self.lengths) == summary.documents:
            raise _damaged(
                f"{folder} has {len(self._records)} records and {len(self.lengths)} lengths, but {CORPUS_FILE} counts "
                f"{summary.documents} documents"
            )
        if (found := int(self.lengths.sum())) != summary.tokens:
            raise _damaged(f"{folder / LENGTHS_FILE} counts {found} tokens, but {CORPUS_FILE} {summary.tokens}")
        _compare(folder, sums, LENGTHS_FILE)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Returns the token ids of one document, int32 ``[lengths[index]]``, without BOS and EOS."""
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise _damaged(f"document {index} of {self._folder} cannot be read ({first_line(error)})") from error
        if len(record) != self.lengths[index] * self._dtype.itemsize:
            raise _damaged(
                f"document {index} of {self._folder} has {len(record) // self._dtype.itemsize} tokens, but "
                f"{LENGTHS_FILE} counts {self.lengths[index]}"
            )
        return np.frombuffer(record, self._dtype).astype(np.int32)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of the documents, in order; read on first use."""
        path = self._folder / IDS_FILE
        _compare(self._folder, self._sums, IDS_FILE)
        try:
            with path.open(encoding="utf-8") as file:
                return tuple(json.loads(line) for line in file)
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(f"{path} cannot be read ({first_line(error)})") from error


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus (see the module for its files).

    Attributes:
      folder: folder of the corpus.
      tokenizer: tokenizer of its documents.
      summaries: counts by split.
      content_hash: SHA-256 (hex) of tokenizer, ids and tokens, independent of shards.
      arguments: arguments of ``prepare``.
      input_signatures: signatures of its inputs, by argument: names and sizes, no text.
      skipped_files: bad files that were skipped, with the reasons.
      dropped: numbers of dropped documents: ``"empty"`` ones, and ``"duplicate"`` ones with ``deduplicate``.
      input_report: report on each input (``natsjax.data.readers.input_report``).
      sums: SHA-256 (hex) of the files without checksums of their own, by name; empty for an older corpus.
    """

    folder: Path
    tokenizer: Tokenizer
    summaries: dict[str, SplitSummary]
    content_hash: str
    arguments: dict[str, str | int | float | bool | None]
    input_signatures: dict[str, str]
    skipped_files: dict[str, str]
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    input_report: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sums: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Reads corpus.json and the tokenizer.

        Raises:
          UserError: the folder has no prepared corpus, or one of another format version, or another tokenizer than the
            corpus was made with.
        """
        check_file_name(folder)
        folder = Path(os.path.expanduser(folder))
        description = _read_description(folder)
        sums = description.get("sha256", {})  # an older corpus has none
        if not isinstance(sums, dict):
            raise _damaged(f"{folder / CORPUS_FILE} has a wrong field sha256")
        for name in sums:
            if name.startswith(f"{TOKENIZER_FOLDER}/"):
                _compare(folder, sums, name)
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        try:
            expected = description["tokenizer"]["fingerprint"]
            corpus = cls(
                folder=folder,
                tokenizer=tokenizer,
                summaries={name: SplitSummary.from_json(description["splits"][name]) for name in SPLITS},
                content_hash=description["content_hash"],
                arguments=description["arguments"],
                input_signatures=description["input_signatures"],
                skipped_files=description["skipped_files"],
                dropped=description.get("dropped", {}),  # an older corpus has none
                input_report=description.get("input_report", {}),
                sums=sums,
            )
        except (KeyError, TypeError) as error:
            raise _damaged(f"{folder / CORPUS_FILE} lacks or garbles the field {error}") from error
        found = tokenizer.fingerprint
        if found != expected:
            raise _damaged(
                f"the tokenizer in {folder / TOKENIZER_FOLDER} (fingerprint {found[:12]}…) is not the one "
                f"that the corpus was prepared with ({expected[:12]}…)"
            )
        return corpus

    def save(self) -> None:
        """Writes corpus.json and the tokenizer into ``folder``; the documents are written by ``prepare``."""
        self.tokenizer.save(self.folder / TOKENIZER_FOLDER)
        small = [f"{split}/{name}" for split in self.summaries for name in (LENGTHS_FILE, IDS_FILE)]
        names = [*checksums.names_below(self.folder, TOKENIZER_FOLDER), *small]
        description = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {
                "kind": self.tokenizer.kind,
                "vocab_size": self.tokenizer.vocab_size,
                "fingerprint": self.tokenizer.fingerprint,
            },
            "splits": {name: summary.to_json() for name, summary in self.summaries.items()},
            "content_hash": self.content_hash,
            "arguments": self.arguments,
            "input_signatures": self.input_signatures,
            "skipped_files": self.skipped_files,
            "dropped": self.dropped,
            "input_report": self.input_report,
            "sha256": checksums.digests(self.folder, names),
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        # Paths that are not UTF-8 have surrogates, which are written as JSON escapes.
        (self.folder / CORPUS_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")

    def documents(self, split: str) -> Documents:
        """Opens the documents of a split, ``"train"`` or ``"validation"``.

        Raises:
          UserError: there is no such split, or its files are missing or damaged.
        """
        if split not in self.summaries:
            raise UserError(f"the corpus {self.folder} has no split {split!r}; it has {', '.join(self.summaries)}.")
        sums = {name.removeprefix(f"{split}/"): value for name, value in self.sums.items()}
        return Documents(self.folder / split, self.summaries[split], record_dtype(self.tokenizer.vocab_size), sums)


def _compare(folder: Path, sums: Mapping[str, str], name: str) -> None:
    """Raises UserError if a file that has a checksum is missing, a pointer, or damaged."""
    check_file_no_pointer(folder / name)
    if name in sums and checksums.first_damaged(folder, sums, [name]) is not None:
        raise _damaged(f"{folder / name} is not what was prepared (it is missing, or has another SHA-256)")


def _damaged(what: str) -> UserError:
    return UserError(f"{what}; prepare the corpus again.")


def _read_description(folder: Path) -> dict:
    path = folder / CORPUS_FILE
    try:
        data = path.read_bytes()
        check_no_pointer(path, data)
        description = json.loads(data.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is no prepared corpus: it has no {CORPUS_FILE}; prepare one with "
            f"`python -m natsjax.data.prepare --input=… --output={folder}`."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {first_line(error)}.") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(f"{path} has format_version {version!r}, but this natsjax reads version {FORMAT_VERSION}")
    return description
