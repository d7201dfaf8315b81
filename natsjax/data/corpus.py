"""A prepared corpus on disk: its files, and reading them.

    DIR/corpus.json                 what it is: format, tokenizer, counts, content hash, how it was made
    DIR/tokenizer/                  the tokenizer (`natsjax.data.tokenizer.load_tokenizer`)
    DIR/SPLIT/00000.arrayrecord …   one record a document: its token ids without BOS and EOS, little-endian
                                    uint16, or uint32 where the vocabulary has more than 65,536 ids
    DIR/SPLIT/lengths.npy           int64 [num_documents], tokens in each document
    DIR/SPLIT/document_ids.ndjson   one JSON string a line, the ids in the same order

with SPLIT one of `train` and `validation`. Lengths and ids lie beside the records, not in corpus.json, so
that this stays small enough to read by eye and a run can lay out its stream without opening a shard.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from array_record.python.array_record_data_source import ArrayRecordDataSource

from natsjax.data.tokenizer import Tokenizer, load_tokenizer
from natsjax.errors import UserError
from natsjax.settings import check_file_name

FORMAT_VERSION = 1
SPLITS = ("train", "validation")

CORPUS_FILE = "corpus.json"
TOKENIZER_FOLDER = "tokenizer"
LENGTHS_FILE = "lengths.npy"
IDS_FILE = "document_ids.ndjson"  # not .jsonl: whoever prepares inside the input folder would read it as text


def shard_name(number: int) -> str:
    """File name of a split's shard."""
    return f"{number:05d}.arrayrecord"


def record_dtype(vocab_size: int) -> np.dtype:
    """The type that token ids are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

    Attributes:
      documents: number of documents.
      tokens: number of tokens, BOS and EOS not counted.
      bytes: size of the text in UTF-8.
      shards: number of ArrayRecord files.
      bytes_per_token: `bytes / tokens`.
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
        """The counts with `bytes_per_token`, for corpus.json."""
        return dataclasses.asdict(self) | {"bytes_per_token": round(self.bytes_per_token, 4)}


class Documents:
    """The tokenised documents of one split, by index; threads may share it, and it can be pickled.

    Attributes:
      lengths: int64 `[num_documents]`, tokens in each document, without BOS and EOS.

    Args:
      folder: the split's folder.
      summary: its counts, as corpus.json gives them.
      dtype: how the records store token ids.

    Raises:
      UserError: a file is missing, damaged, or does not fit the counts.
    """

    def __init__(self, folder: Path, summary: SplitSummary, dtype: np.dtype):
        self._folder = folder
        self._dtype = dtype
        try:
            self.lengths: npt.NDArray[np.int64] = np.load(folder / LENGTHS_FILE)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / LENGTHS_FILE} cannot be read ({error}); prepare the corpus again.") from error
        shards = [folder / shard_name(number) for number in range(summary.shards)]
        try:
            self._records = ArrayRecordDataSource(shards)
        except RuntimeError as error:  # the one exception of array_record's C++ side
            raise UserError(f"a shard of {folder} cannot be read ({error}); prepare the corpus again.") from error
        if not len(self._records) == len(self.lengths) == summary.documents:
            raise UserError(
                f"{folder} holds {len(self._records)} records and {len(self.lengths)} lengths where "
                f"{CORPUS_FILE} says {summary.documents} documents; prepare the corpus again."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of one document, int32 `[lengths[index]]`, without BOS and EOS."""
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The documents' ids, in order; read when first asked for."""
        path = self._folder / IDS_FILE
        try:
            with path.open(encoding="utf-8") as file:
                return tuple(json.loads(line) for line in file)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the corpus again.") from error


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus (see the module for its files).

    Attributes:
      folder: where it lies.
      tokenizer: what its documents were encoded with.
      summaries: counts by split name.
      content_hash: SHA-256 (hex) over tokenizer, ids and tokens, however they lie in shards.
      arguments: what `prepare` was asked for.
      input_signatures: cheap marks of what its inputs held.
      skipped_files: bad files that were left out at the user's wish, with what was wrong with them.
      dropped: documents that were left out: `"empty"` ones, and `"duplicate"` ones where that was asked for.
    """

    folder: Path
    tokenizer: Tokenizer
    summaries: dict[str, SplitSummary]
    content_hash: str
    arguments: dict[str, str | int | float | bool | None]
    input_signatures: dict[str, str]
    skipped_files: dict[str, str]
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Read corpus.json and the tokenizer.

        Raises:
          UserError: the folder holds no prepared corpus, one of another format version, or a tokenizer that
            is not the one that it was made with.
        """
        check_file_name(folder)
        folder = Path(folder)
        description = _read_description(folder)
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        try:
            expected = description["tokenizer"]["fingerprint"]
            corpus = cls(
                folder=folder,
                tokenizer=tokenizer,
                summaries={name: _summary(description["splits"][name]) for name in SPLITS},
                content_hash=description["content_hash"],
                arguments=description["arguments"],
                input_signatures=description["input_signatures"],
                skipped_files=description["skipped_files"],
                dropped=description.get("dropped", {}),  # absent in corpora made before it was counted
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / CORPUS_FILE} lacks or garbles the field {error}.") from error
        found = tokenizer.fingerprint
        if found != expected:
            raise UserError(
                f"the tokenizer in {folder / TOKENIZER_FOLDER} (fingerprint {found[:12]}…) is not the one "
                f"that the corpus was prepared with ({expected[:12]}…); prepare the corpus again."
            )
        return corpus

    def save(self) -> None:
        """Write corpus.json and the tokenizer into `folder`; the documents are written by `prepare`.

        Raises:
          OSError: the folder cannot be written.
        """
        self.tokenizer.save(self.folder / TOKENIZER_FOLDER)
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
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (self.folder / CORPUS_FILE).write_text(text, encoding="utf-8")

    def documents(self, split: str) -> Documents:
        """The documents of a split, `"train"` or `"validation"`.

        Raises:
          UserError: there is no such split, or its files are missing or damaged.
        """
        if split not in self.summaries:
            raise UserError(f"the corpus {self.folder} has no split {split!r}; it has {', '.join(self.summaries)}.")
        return Documents(self.folder / split, self.summaries[split], record_dtype(self.tokenizer.vocab_size))


def _summary(fields: dict) -> SplitSummary:
    return SplitSummary(**{field.name: fields[field.name] for field in dataclasses.fields(SplitSummary)})


def _read_description(folder: Path) -> dict:
    path = folder / CORPUS_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is no prepared corpus: it holds no {CORPUS_FILE}; make one with "
            f"`python -m natsjax.data.prepare --input=… --output={folder}`."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version!r}, but this natsjax reads version {FORMAT_VERSION}; "
            "prepare the corpus again."
        )
    return description
