"""Make a folder that other processes see either whole or not at all, in parts that survive an interruption.

A folder that is not there yet is made beside its place and renamed. One that is there already (empty, that is) stays
the folder that it is: it may be a mount point, where a link leads, somebody's current folder, or all that one may
write. Its contents are made in `.partial` inside it and renamed one by one, last the file that tells a finished folder
from any other (`marker`). Either way the last step is tried before the work (`try_folder`). Callers give folders as
`natsjax.config_fields.real_path` returns them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TextIO

import numpy as np

from natsjax.config_fields import check_file_name
from natsjax.errors import UserError
from natsjax.runtime.files import hidden_name, make_folder

PART_SUFFIX = ".npz"

_IDENTITY_FILE = "request.json"
_UNFINISHED = ".unfinished"
# Inside a folder that is there already.
_LOCK, _PARTIAL, _REPLACED = ".lock", ".partial", ".replaced"
_TRIED, _TRIED_AND_MOVED = ".tried", ".moved.tried"
_LOST_AND_FOUND = "lost+found"  # on every ext4 disk, mounted

_log = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; others wait here. A process that dies lets go of the lock.

    Args:
      folder: need not exist; a lock file lies beside it while the lock is held, or in it where only that can be.

    Raises:
      OSError: the parent folder cannot be made or written.
    """
    make_folder(folder.parent)
    path = lock_path(folder)
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


def lock_path(folder: Path) -> Path:
    """Where `folder_lock` has its file; one that is there while nobody holds it was left by a killed process."""
    if folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
        return folder / _LOCK
    return folder.parent / hidden_name(folder.name, "lock")


def is_free(folder: Path, own: Collection[str]) -> bool:
    """Whether `folder` may be made: there is nothing, or nothing in it but what an interrupted process left there.

    Args:
      folder: need not exist.
      own: names in a finished one. What was put into place counts as left there while `.partial` lies beside it.

    Raises:
      OSError: it cannot be read.
    """
    if not folder.is_dir():
        return not os.path.lexists(folder)
    names = set(os.listdir(folder)) - {_LOCK, _PARTIAL, _TRIED, _TRIED_AND_MOVED, _LOST_AND_FOUND}
    return not names or ((folder / _PARTIAL).is_dir() and names <= set(own))


def try_folder(folder: Path) -> None:
    """Do what making `folder` ends with, before work is spent on it, and undo it; hold `folder_lock(folder)`.

    Raises:
      UserError: its name is no UTF-8.
      OSError: it cannot be made there.
    """
    check_file_name(folder)
    # Beside a folder that is not there under another name than its own, which a killed process would leave there.
    names: tuple[str, ...] = (_TRIED, _TRIED_AND_MOVED)
    if not folder.is_dir():
        names = tuple(hidden_name(folder.name, name.removeprefix(".")) for name in names)
        with suppress(FileNotFoundError):
            os.lstat(folder)  # whether its name is too long
    before, after = ((folder if folder.is_dir() else folder.parent) / name for name in names)
    try:
        for left in (before, after):
            shutil.rmtree(left, ignore_errors=True)  # of a killed process
        before.mkdir()
        (before / "file").write_bytes(b"tried before the work\n")
        before.rename(after)
    finally:
        for left in (before, after):
            shutil.rmtree(left, ignore_errors=True)


def place(temporary: Path, folder: Path, marker: str) -> None:
    """Give a finished folder its name; where there is a folder already, its contents move in, `marker` last.

    Raises:
      OSError: it cannot be renamed (there is something else by that name).
    """
    if not folder.is_dir():
        temporary.rename(folder)
        return
    _move(temporary, folder, sorted(os.listdir(temporary), key=lambda name: (name == marker, name)))
    temporary.rmdir()


def set_aside(folder: Path, marker: str) -> None:
    """Move what a finished folder holds into `.replaced` inside it, `marker` first: another one is to take its place.

    Raises:
      OSError: it cannot be moved.
    """
    names = set(os.listdir(folder)) - {_LOCK, _PARTIAL, _TRIED, _TRIED_AND_MOVED, _REPLACED, _LOST_AND_FOUND}
    (folder / _REPLACED).mkdir()
    _move(folder, folder / _REPLACED, sorted(names, key=lambda name: (name != marker, name)))


def put_back(folder: Path, marker: str) -> None:
    """Undo `set_aside`, unless another one has taken its place; then remove what was set aside.

    Raises:
      OSError: it cannot be moved.
    """
    replaced = folder / _REPLACED
    if not replaced.is_dir():
        return
    if not (folder / marker).exists():
        _move(replaced, folder, sorted(os.listdir(replaced), key=lambda name: (name == marker, name)))
    shutil.rmtree(replaced, ignore_errors=True)


def _move(source: Path, target: Path, names: Collection[str]) -> None:
    for name in names:
        if (target / name).is_dir():  # of a process that was killed here
            shutil.rmtree(target / name)
        (source / name).replace(target / name)


@contextmanager
def new_folder(folder: Path, marker: str, *, inside: bool) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `folder` if the block ends well, and vanishes otherwise.

    What a killed run left under the temporary name is removed first, so hold `folder_lock(folder)`.

    Args:
      folder: need not exist.
      marker: the file in it that is put into place last.
      inside: `folder` is there, and what is made moves into it; False: what is made takes its name.

    Raises:
      OSError: the temporary folder cannot be made or renamed.
    """
    for left in partial_paths(folder):
        if left.exists():
            _log.info("Removing what an interrupted run left in %s", left)
            shutil.rmtree(left)
    temporary = partial_paths(folder)[0 if inside else 1]
    temporary.mkdir()
    try:
        yield temporary
        place(temporary, folder, marker)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where it was put into place


class PartialFolder:
    """`.NAME.partial` beside a folder that is being made, or `.partial` in one that was there already.

    It holds parts of the work that a later process can go on from.

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
    """Where the parts of a folder lie while it is made: in it, if it is there already, else beside it."""
    inside, beside = partial_paths(folder)
    return inside if folder.is_dir() else beside


def partial_paths(folder: Path) -> tuple[Path, Path]:
    """Where parts of a folder may lie: in it, and beside it."""
    return folder / _PARTIAL, folder.parent / hidden_name(folder.name, "partial")


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
