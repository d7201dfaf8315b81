"""Make a folder that other processes see either whole or not at all."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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
    temporary = folder.parent / f".{folder.name}.partial"
    if temporary.exists():
        _log.info("Removing what an interrupted run left in %s", temporary)
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename was reached


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
