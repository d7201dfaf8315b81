"""SHA-256 of the files of a folder, stored in the folder in the format of ``sha256sum``, which can check them too.

What is stored on a disk for months is not always what was written there: TensorStore checks its own index, and reads a
chunk whose bytes have changed as other numbers.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor


def digest(path: pathlib.Path) -> str:
    """Computes the SHA-256 of a file, hex.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Computes the SHA-256 of files, by their names below a folder.

    Raises:
      OSError: one cannot be read.
    """
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def names_below(folder: pathlib.Path, part: str) -> list[str]:
    """Lists the files below ``folder/part``, by their names below ``folder``, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in (folder / part).rglob("*") if path.is_file())


def as_text(sums: Mapping[str, str]) -> str:
    """Formats a line for each file, as ``sha256sum`` writes and reads them."""
    return "".join(f"{value}  {name}\n" for name, value in sums.items())


def from_text(text: str) -> dict[str, str]:
    """Reads what ``as_text`` wrote.

    Raises:
      ValueError: it is something else.
    """
    *lines, rest = text.split("\n")
    if rest:
        raise ValueError("its last line is not whole")
    pairs = [line.split("  ", maxsplit=1) for line in lines]
    return {name: value for value, name in pairs}


def first_damaged(folder: pathlib.Path, sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """Finds the first file that is missing, unreadable or changed; returns None where all are as they were.

    Args:
      folder: that the names are below.
      sums: what the files were, by name.
      names: of files to look at.
    """
    names = list(names)

    def is_damaged(name: str) -> bool:
        try:
            return digest(folder / name) != sums[name]
        except OSError:
            return True

    with ThreadPoolExecutor() as pool:
        return next((name for name, damaged in zip(names, pool.map(is_damaged, names), strict=True) if damaged), None)
