"""Files and folders on disk: tried before the work, written whole or not at all, and locked against other processes.

A folder that is not there yet is made beside its place and renamed. One that is there already (empty, that is) stays
the folder that it is: it may be a mount point, the target of a link, somebody's current folder, or the only place that
may be written. Its contents are made in ``.partial`` inside it and renamed one by one, last the file that tells a
finished folder from any other (``marker``). Either way the last step is tried before the work (``try_folder``). Folders
are given as ``natsjax.config_fields.real_path`` returns them.

Locks are ``flock``: the kernel releases one however its process ends. The library ``filelock`` keeps what is tested
here from its version 4 on, but polls where the kernel can wait, does not remove the file of a lock, and installs hooks
(at fork, and from Python 3.12 on for every audit event) in each process: more than the few lines below.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO

from natsjax.config_fields import check_file_name, real_path
from natsjax.errors import UserError

_LONGEST_NAME = 255  # bytes, of Linux's file systems

_log = logging.getLogger("natsjax")  # log.py, which writes files, imports this

# Inside a folder that is there already.
_LOCK, _PARTIAL, _REPLACED = ".lock", ".partial", ".replaced"
_TRIED, _TRIED_AND_MOVED = ".tried", ".moved.tried"
_LOST_AND_FOUND = "lost+found"  # on every ext4 disk, mounted

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
    errno.EXDEV: "it is on two file systems: name a new folder inside it, or another place",
    errno.EINVAL: "that file system takes no such name: name another one",
    errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n)",
    errno.ENFILE: "this machine may open no more files: end other programs, or raise its limit",
    errno.EIO: "the disk or its connection fails: look into the system's log, and name a place on another disk",
    errno.ESTALE: "the file server has forgotten it: mount it again",
    errno.ENOLCK: "that file system knows no locks: name a place on another one",
    errno.ENOTSUP: "that file system cannot do this: name a place on another one",
}


def reason(error: OSError) -> str:
    """Returns what the system refused, in its own words."""
    return error.strerror or str(error).split("\n")[0].rstrip(".") or type(error).__name__


def advice(error: OSError, *, may_move: bool = True) -> str:
    """Returns what would help, by ``errno``, or by the words of libraries that give none.

    Args:
      error: what the system raised.
      may_move: whether another place is as good; False: what is done so far is stored where it failed.
    """
    if not may_move:
        return "make room there" if is_full(error) else "put that right"
    return _ADVICE.get(_number(error), "name another place")


def is_full(error: OSError) -> bool:
    """Returns whether there is no room left."""
    return _number(error) in _FULL


def _number(error: OSError) -> int:
    if error.errno is not None:
        return error.errno
    return next((known for known in _ADVICE if os.strerror(known) in str(error)), 0)


def unwritable(name: str | os.PathLike[str], error: OSError) -> UserError:
    """Returns the sentence about something that cannot be written, with the advice that follows from the error."""
    return UserError(f"{os.fspath(name)} cannot be written: {reason(error)}; {advice(error)}.")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder with those above it, where it is not there yet; a link is followed.

    Raises:
      OSError: it cannot be made.
    """
    try:
        os.makedirs(real_path(folder), exist_ok=True)
    except FileExistsError as error:  # which is a file
        number = errno.ELOOP if os.path.islink(error.filename) else errno.ENOTDIR
        raise OSError(number, os.strerror(number), error.filename) from error


def write_file(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all, even if the machine stops.

    Links are followed. What is no ordinary file (a pipe, say) is not replaced, but written into.

    Args:
      path: the file.
      content: its bytes, or a function that writes them to an open file.

    Raises:
      OSError: it cannot be written; what was there stays.
    """

    def fill(file: BinaryIO) -> None:
        if callable(content):
            content(file)
        else:
            file.write(content)

    if _is_stream(path):
        with open(path, "wb") as file:
            fill(file)
        return
    path = real_path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def write_text_file(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, UTF-8, as ``write_file`` does.

    Raises:
      UserError: it cannot be written (a full disk, say); what was there stays.
    """
    try:
        write_file(path, text.encode("utf-8"))
    except OSError as error:
        raise unwritable(path, error) from error


def append(file: FileIO, data: bytes) -> None:
    """Appends all of the data to an open, unbuffered file or nothing: a full disk leaves no half line.

    Raises:
      OSError: it cannot be written.
    """
    size, rest = file.seek(0, os.SEEK_END), data
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except OSError:
        with contextlib.suppress(OSError):  # what is no ordinary file
            file.truncate(size)
        raise


def try_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Tries ``write_file`` before long work, in the folders of these files, and undoes it.

    Args:
      paths: the files; folders that are not there are made, and removed again.

    Raises:
      OSError: a file could not be written; ``filename`` is its path.
    """
    for path in paths:
        try:
            _try_file(path)
        except OSError as error:
            error.filename = os.fspath(path)
            raise


def check_files(name: str, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Tries files as ``try_files`` does, for the flag ``name``.

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
    """Returns the name of a temporary beside something, ``.NAME.SUFFIX``, as short as names must be."""
    hidden = f".{name}.{suffix}"
    if len(os.fsencode(hidden)) <= _LONGEST_NAME:
        return hidden
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.{suffix}"


def _temporary(path: Path) -> Path:
    return path.parent / hidden_name(path.name, f"{os.getpid()}.tmp")  # by process: several may write at once


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path must not be replaced: a pipe, a device, or the file of an open descriptor."""
    text = os.path.abspath(os.path.expanduser(path))
    named = text.startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return named or (os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text))


def _remove(path: Path) -> None:
    """Removes a file that may not be there, on a file system that may refuse even that."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- locks


class InUseError(Exception):
    """A lock that another process holds; the message is the process's id, or empty where it could not write that."""


@contextlib.contextmanager
def lock(path: Path, *, wait: str = "") -> Iterator[None]:
    """Holds the lock of a file for this process; its forked children hold nothing.

    Args:
      path: the lock file, made where it is missing; holds the id of the process.
      wait: what to log before waiting for another process; the file is removed with the lock. Empty: no waiting, and
        the file stays.

    Raises:
      InUseError: another process holds it, and ``wait`` is empty.
      OSError: the file cannot be made.
    """
    file = _locked(path, wait)
    while wait and not _is_file_at(file, path):  # removed by its holder; a process that came later locked a new one
        file.close()
        file = _locked(path, wait)
    _locks.add(file)
    try:
        with contextlib.suppress(OSError):  # on a full disk nobody is told who holds it
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield
    finally:
        if wait:
            path.unlink(missing_ok=True)
        _locks.discard(file)
        file.close()


_locks: set[IO[str]] = set()


def _locked(path: Path, wait: str) -> IO[str]:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed with the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            file.seek(0)
            with file:
                raise InUseError(file.read().strip()) from error
        _log.warning(wait)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _in_child() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_in_child)


# ----------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time make a folder; others wait here.

    Args:
      folder: the folder, which need not exist; its lock file is beside it, or in it where only that can be written.

    Raises:
      OSError: the parent folder cannot be made or written.
    """
    make_folder(folder.parent)
    with lock(lock_path(folder), wait=f"Another process is preparing {folder}; waiting for it"):
        yield


def lock_path(folder: Path) -> Path:
    """Returns the file of ``folder_lock``; one that nobody holds was left by a killed process."""
    if folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
        return folder / _LOCK
    return folder.parent / hidden_name(folder.name, "lock")


def is_free(folder: Path, own: Collection[str]) -> bool:
    """Returns whether a folder may be made: nothing is there, or nothing but leftovers of an interrupted process.

    Args:
      folder: the folder, which need not exist.
      own: names in a finished one; while ``.partial`` is beside them, they are leftovers.

    Raises:
      OSError: it cannot be read.
    """
    if not folder.is_dir():
        return not os.path.lexists(folder)
    names = set(os.listdir(folder)) - {_LOCK, _PARTIAL, _TRIED, _TRIED_AND_MOVED, _LOST_AND_FOUND}
    return not names or ((folder / _PARTIAL).is_dir() and names <= set(own))


def try_folder(folder: Path) -> None:
    """Tries the last step of making a folder before work is spent on it, and undoes it; hold ``folder_lock``.

    Raises:
      UserError: its name is no UTF-8.
      OSError: it cannot be made there.
    """
    check_file_name(folder)
    # Beside a folder that is not there under another name than its own, which a killed process would leave there.
    names: tuple[str, ...] = (_TRIED, _TRIED_AND_MOVED)
    if not folder.is_dir():
        names = tuple(hidden_name(folder.name, name.removeprefix(".")) for name in names)
        with contextlib.suppress(FileNotFoundError):
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
    """Gives a finished folder its name; where there is a folder already, its contents move in, ``marker`` last.

    Raises:
      OSError: it cannot be renamed (there is something else by that name).
    """
    if not folder.is_dir():
        temporary.rename(folder)
        return
    _move(temporary, folder, sorted(os.listdir(temporary), key=lambda name: (name == marker, name)))
    temporary.rmdir()


def set_aside(folder: Path, marker: str) -> None:
    """Moves the contents of a finished folder into ``.replaced`` inside it, ``marker`` first, to be replaced.

    Raises:
      OSError: it cannot be moved.
    """
    names = set(os.listdir(folder)) - {_LOCK, _PARTIAL, _TRIED, _TRIED_AND_MOVED, _REPLACED, _LOST_AND_FOUND}
    (folder / _REPLACED).mkdir()
    _move(folder, folder / _REPLACED, sorted(names, key=lambda name: (name != marker, name)))


def put_back(folder: Path, marker: str) -> None:
    """Gives what ``replaced_folder`` set aside its place again, unless another one has taken it; else removes it.

    A folder beside it without ``marker`` was being removed by a process that was killed.

    Raises:
      OSError: it cannot be moved.
    """
    inside, beside = folder / _REPLACED, _beside(folder)
    if (beside / marker).exists() and not folder.exists():
        beside.rename(folder)
    if inside.is_dir() and not (folder / marker).exists():
        _move(inside, folder, sorted(os.listdir(inside), key=lambda name: (name == marker, name)))
    for replaced in (inside, beside):
        shutil.rmtree(replaced, ignore_errors=True)


def can_be_renamed(folder: Path) -> bool:
    """Returns whether a folder can be replaced as a whole: no mount point, nor somebody's current folder.

    Tried, by its rename and back; killed between the two, it waits for ``put_back``.
    """
    if os.path.samefile(folder, os.curdir):
        return False
    try:
        folder.rename(_beside(folder))
    except OSError:
        return False
    _beside(folder).rename(folder)
    return True


def _beside(folder: Path) -> Path:
    """Returns the place of a folder while another one replaces the folder itself."""
    return folder.parent / hidden_name(folder.name, "replaced")


def _move(source: Path, target: Path, names: Collection[str]) -> None:
    for name in names:
        if (target / name).is_dir():  # of a process that was killed here
            shutil.rmtree(target / name)
        (source / name).replace(target / name)


@contextlib.contextmanager
def new_folder(folder: Path, marker: str, *, inside: bool) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes ``folder`` if the block ends well, and vanishes otherwise.

    What a killed run left under the temporary name is removed first: hold ``folder_lock``.

    Args:
      folder: the folder, which need not exist.
      marker: the file in it that is put into place last.
      inside: whether ``folder`` is there, and the contents move into it; False: the temporary takes its name.

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


@contextlib.contextmanager
def replaced_folder(folder: Path, marker: str, *, inside: bool) -> Iterator[Path]:
    """Yields a temporary folder as ``new_folder`` does; a finished folder by that name stays where the block fails.

    Args:
      folder: the folder, finished, empty or not there; hold ``folder_lock``.
      marker: as in ``new_folder``.
      inside: as in ``new_folder``; False also where the folder is there and can be replaced (``can_be_renamed``).

    Raises:
      OSError: as in ``new_folder``.
    """
    try:
        with new_folder(folder, marker, inside=inside) as temporary:
            yield temporary
            if not inside and folder.is_dir():
                folder.rename(_beside(folder))
            elif (folder / marker).exists():
                set_aside(folder, marker)
    finally:
        put_back(folder, marker)


def partial_path(folder: Path) -> Path:
    """Returns where the parts of a folder are stored while it is made: in it, if it is there, else beside it."""
    inside, beside = partial_paths(folder)
    return inside if folder.is_dir() else beside


def partial_paths(folder: Path) -> tuple[Path, Path]:
    """Returns the places of the parts of a folder: in it, and beside it."""
    return folder / _PARTIAL, folder.parent / hidden_name(folder.name, "partial")
