"""Parts of the work of ``prepare``, which survive an interruption: a later call resumes from them."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from natsjax.errors import UserError
from natsjax.runtime.files import partial_path, write_file
from natsjax.runtime.log import logger

PART_SUFFIX = ".npz"

_IDENTITY_FILE = "request.json"


class PartialFolder:
    """``.NAME.partial`` beside a folder that is being made, or ``.partial`` in one that was there already.

    A context manager. Leaving it well removes the folder; so does a ``UserError`` (its cause may have spoilt the
    parts), and any other exception before the first part is done. Hold ``files.folder_lock`` meanwhile.

    Args:
      folder: the folder to make, which need not exist.
      identity: what the parts depend on, as plain JSON. Parts of another identity are thrown away.

    Attributes:
      path: the partial folder.
    """

    def __init__(self, folder: Path, identity: object):
        self.path = partial_path(folder)
        self._identity = json.dumps(identity, sort_keys=True)

    def __enter__(self) -> PartialFolder:
        mark = self.path / _IDENTITY_FILE
        if self.path.exists():
            if mark.is_file() and mark.read_bytes() == self._identity.encode():
                logger.info("Resuming with what an interrupted run left in %s", self.path)
            else:
                logger.info("Throwing away %s, which an interrupted run left for another request or text", self.path)
                shutil.rmtree(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            if not mark.exists():
                write_file(mark, self._identity.encode())
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(keep=error is not None and (not isinstance(error, UserError) or isinstance(error, KeptPartsError)))

    def part(self, name: str) -> Path:
        """Returns the path of a part; it exists if and only if the part is whole."""
        return self.path / f"{name}{PART_SUFFIX}"

    def _leave(self, *, keep: bool) -> None:
        if not (keep and any(self.path.glob(f"*{PART_SUFFIX}"))):
            shutil.rmtree(self.path, ignore_errors=True)


class KeptPartsError(UserError):
    """A mistake that does not touch the parts that are done."""


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file that appears whole or not at all, even if the machine stops."""
    write_file(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # numpy: `allow_pickle`


def read_part(path: Path) -> dict[str, np.ndarray]:
    """Reads what ``write_part`` wrote; raises OSError if it cannot."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise OSError(f"{path} is damaged: {error}; delete {path.parent}") from error
