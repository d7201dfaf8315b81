"""A folder that a command writes: it appears whole or not at all, and replaces what the command wrote there before."""

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterator

from natsjax.config_fields import check_file_name, real_path
from natsjax.errors import UserError
from natsjax.runtime.files import (
    can_be_renamed,
    folder_lock,
    is_free,
    put_back,
    replaced_folder,
    try_folder,
    unwritable,
)


class OutputFolder:
    """The folder of ``--output``, tried before long work and written behind it.

    Args:
      output: the folder; it need not be there.
      marker: name of the file in it that is written last: what has it is whole.
      names: of all that the command writes there.
      what: of the command's folders, in messages, as "an export".

    Raises:
      UserError: the name is empty or no UTF-8, or the folder is something else or cannot be written.
    """

    def __init__(self, output: str | os.PathLike[str], *, marker: str, names: Collection[str], what: str):
        if not os.fspath(output):
            raise UserError("--output is empty; name the folder to make ('.' is the current one).")
        check_file_name(output)
        self.path = pathlib.Path(os.path.expanduser(output))
        self._marker, self._names, self._what = marker, (marker, *names), what
        folder = self._folder = real_path(self.path)
        with self._errors(), folder_lock(folder):
            put_back(folder, marker)
            self._check_replaceable()
            # An empty folder stays the folder that it is; a finished one is replaced as a whole, if it can be.
            self._in_place = folder.is_dir() and not (self._is_finished and can_be_renamed(folder))
            if self._in_place or not folder.is_dir():
                try_folder(folder)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[pathlib.Path]:
        """Yields an empty temporary folder that takes the place of this one if the block ends well.

        Raises:
          UserError: it cannot be written, or something else has come there.
        """
        writing = replaced_folder(self._folder, self._marker, inside=self._in_place)
        with self._errors(), folder_lock(self._folder), writing as temporary:
            yield temporary
            self._check_replaceable()

    @property
    def _is_finished(self) -> bool:
        return os.path.exists(self.path / self._marker)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises what the system refuses as a sentence about the output."""
        try:
            yield
        except OSError as error:
            raise unwritable(f"--output={self.path}", error) from error

    def _check_replaceable(self) -> None:
        """Refuses to write over what the command did not write."""
        path = self.path
        if path.is_dir() and not self._is_finished and not is_free(real_path(path), self._names):
            raise UserError(f"--output={path} holds something that is not {self._what}; name a new folder.")
        if path.exists() and not path.is_dir():
            raise UserError(f"--output={path} is a file; name a new folder.")
