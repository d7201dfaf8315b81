"""Files and folders that a command is to write: tried before the work, written whole, with advice where it fails."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from natsjax.config_fields import real_path
from natsjax.errors import UserError

_LONGEST_NAME = 255  # bytes, of Linux's file systems

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = "name a place that you may write, or have its permissions changed"
_ROOM = "make room there, or name a place on another disk"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"your quota there is used up: {_ROOM}",
    errno.EFBIG: "files may not be so large there (ulimit -f, or the file system's limit): name another place",
    errno.EROFS: "nothing can be written on that file system: name a place on another one",
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: "a part of that path is a file where a folder was expected: name another path",
    errno.EISDIR: "there is a folder by the name of that file: name another one",
    errno.EEXIST: "something else has that name: name another one",
    errno.ENOTEMPTY: "something else has that name: name another one",
    errno.ENOENT: "no such folder is there, nor can be made: name another path",
    errno.ENAMETOOLONG: f"a name may have {_LONGEST_NAME} bytes: name a shorter one",
    errno.ELOOP: "links of that path lead in a circle: name the folder itself",
    errno.EBUSY: "something else uses it: name a new folder inside it, or another place",
    errno.EXDEV: "it lies on two file systems: name a new folder inside it, or another place",
    errno.EINVAL: "that file system takes no such name: name another one",
    errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n)",
    errno.ENFILE: "this machine may open no more files: end other programs, or raise its limit",
    errno.EIO: "the disk or its connection fails: look into the system's log, and name a place on another disk",
    errno.ESTALE: "the file server has forgotten it: mount it again",
    errno.ENOLCK: "that file system knows no locks: name a place on another one",
    errno.ENOTSUP: "that file system cannot do this: name a place on another one",
}


def reason(error: OSError) -> str:
    """Says what the system refused, in its own words."""
    return error.strerror or str(error).split("\n")[0].rstrip(".") or type(error).__name__


def advice(error: OSError, *, may_move: bool = True) -> str:
    """Says what would help, by ``errno``; libraries that have none to give say it in words.

    Args:
      error: of the system.
      may_move: whether another place is as good; False: what is done so far lies where it failed.
    """
    if not may_move:
        return "make room there" if is_full(error) else "put that right"
    return _ADVICE.get(_number(error), "name another place")


def is_full(error: OSError) -> bool:
    """Whether there is no room left."""
    return _number(error) in _FULL


def _number(error: OSError) -> int:
    if error.errno is not None:
        return error.errno
    return next((known for known in _ADVICE if os.strerror(known) in str(error)), 0)


def unwritable(name: str | os.PathLike[str], error: OSError) -> UserError:
    """Makes the sentence about something that cannot be written, with the advice that follows from the error."""
    return UserError(f"{os.fspath(name)} cannot be written: {reason(error)}; {advice(error)}.")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder with those above it, where it is not there yet; where a link leads, if it is one.

    Raises:
      OSError: it cannot be made.
    """
    try:
        os.makedirs(real_path(folder), exist_ok=True)
    except FileExistsError as error:  # which is a file
        number = errno.ELOOP if os.path.islink(error.filename) else errno.ENOTDIR
        raise OSError(number, os.strerror(number), error.filename) from error


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; through links, and straight into what is no ordinary file (a pipe, say).

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    if _is_stream(path):
        with open(path, "wb") as file:
            file.write(content)
        return
    path = real_path(path)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def try_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Does, before long work, what ``write_file`` will do after it, in the folders of these files, and undoes it.

    Args:
      paths: of the files; folders that are not there are made, and removed again.

    Raises:
      OSError: a file could not be written; ``filename`` says which.
    """
    for path in paths:
        try:
            _try_file(path)
        except OSError as error:
            error.filename = os.fspath(path)
            raise


def check_files(name: str, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Does what ``try_files`` does, for the flag ``name``.

    Raises:
      UserError: a file could not be written.
    """
    try:
        try_files(paths)
    except OSError as error:
        raise unwritable(name, error) from error


def _try_file(path: str | os.PathLike[str]) -> None:
    if _is_stream(path):
        open(path, "ab").close()
        return
    path = real_path(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with contextlib.suppress(FileNotFoundError):  # that its name is too long, or a folder a file, is another error
        os.lstat(path)
    new_folders = []
    for folder in path.parents:
        if folder.exists():
            break
        new_folders.append(folder)
    temporary = _temporary(path)
    renamed = temporary.with_suffix(".tried")
    try:
        make_folder(path.parent)
        temporary.write_bytes(b"tried before the work\n")
        os.replace(temporary, renamed)
    finally:
        _remove(temporary)
        _remove(renamed)
        for folder in new_folders:
            try:
                folder.rmdir()
            except OSError:  # never made, or somebody else has begun to use it
                break


def hidden_name(name: str, suffix: str) -> str:
    """Makes a name for what lies beside something while it is made, ``.NAME.SUFFIX``, as short as names must be."""
    hidden = f".{name}.{suffix}"
    if len(os.fsencode(hidden)) <= _LONGEST_NAME:
        return hidden
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.{suffix}"


def _temporary(path: Path) -> Path:
    return path.parent / hidden_name(path.name, f"{os.getpid()}.tmp")  # by process: several may write at once


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether there is something that must not be replaced: a pipe, a device, or what a descriptor has open."""
    text = os.path.abspath(os.path.expanduser(path))
    named = text.startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return named or (os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text))


def _remove(path: Path) -> None:
    """Removes a file that may not be there, on a file system that may refuse even that."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
