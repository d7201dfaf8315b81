"""Make a folder that other processes see either whole or not at all, in parts that survive an interruption."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TextIO

import numpy as np

from natsjax.errors import UserError

PART_SUFFIX = ".npz"

_IDENTITY_FILE = "request.json"
_UNFINISHED = ".unfinished"

_log = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; others wait here. A process that dies lets go of the lock.

    Args:
      folder: need not exist; a lock file lies beside it while the lock is held.

    Raises:
      OSError: the parent folder cannot be made or written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    file = _locked(path, folder)
    # Whoever held the lock before us removed the file; a process that came later then locked a new one.
    while not _is_file_at(file, path):
        file.close()
        file = _locked(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling that becomes `folder` if the block ends well, and vanishes otherwise.

    What a killed run left under the temporary name is removed first, so hold `folder_lock(folder)`.

    Raises:
      OSError: the sibling cannot be made or renamed (`folder` exists and is not empty).
    """
    temporary = partial_path(folder)
    if temporary.exists():
        _log.info("Removing what an interrupted run left in %s", temporary)
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename was reached


class PartialFolder:
    """`.NAME.partial` beside a folder that is being made: parts of the work that a later process can go on from.

    A context manager. Leaving it well removes the folder; so does a `UserError` (what it was about may have spoilt the
    parts), and any other exception before the first part is done. Hold `folder_lock(folder)` meanwhile.

    Args:
      folder: what is being made; need not exist.
      identity: what the parts depend on, as plain JSON. Parts of another identity are thrown away.

    Attributes:
      path: the partial folder.

    Raises:
      OSError: it cannot be made or written.
    """

    def __init__(self, folder: Path, identity: object):
        self.path = partial_path(folder)
        self._identity = json.dumps(identity, sort_keys=True)

    def __enter__(self) -> PartialFolder:
        mark = self.path / _IDENTITY_FILE
        if self.path.exists():
            if mark.is_file() and mark.read_bytes() == self._identity.encode():
                _log.info("Going on with what an interrupted run left in %s", self.path)
            else:
                _log.info("Throwing away %s, which an interrupted run left for another request or text", self.path)
                shutil.rmtree(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            for leftover in self.path.glob(f"*{_UNFINISHED}"):
                leftover.unlink(missing_ok=True)
            if not mark.exists():
                write_whole(mark, lambda file: file.write(self._identity.encode()))
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(keep=error is not None and (not isinstance(error, UserError) or isinstance(error, KeptPartsError)))

    @property
    def has_parts(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.path.glob(f"*{PART_SUFFIX}"))

    def part(self, name: str) -> Path:
        """Path of a part; it is there if and only if it is whole."""
        return self.path / f"{name}{PART_SUFFIX}"

    def _leave(self, *, keep: bool) -> None:
        if not (keep and self.has_parts):
            shutil.rmtree(self.path, ignore_errors=True)


class KeptPartsError(UserError):
    """A mistake that does not touch the parts that are done."""


def partial_path(folder: Path) -> Path:
    """Where the parts of a folder lie while it is made."""
    return folder.parent / f".{folder.name}.partial"


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a file that appears whole or not at all, even if the machine stops.

    Raises:
      OSError: it cannot be written.
    """
    write_whole(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # numpy: `allow_pickle`


def read_part(path: Path) -> dict[str, np.ndarray]:
    """What `write_part` wrote.

    Raises:
      OSError: it cannot be read.
    """
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise OSError(f"{path} is damaged: {error}; delete {path.parent}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    # By process: what a killed run left working may still be at the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _locked(path: Path, folder: Path) -> TextIO:
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("Another process is preparing %s; waiting for it", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_file_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
