"""What a file is by its first bytes: a pointer to a file that is kept elsewhere, or a format that its name hides."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from natsjax.errors import UserError

HEAD_BYTES = 1024  # Git LFS takes nothing larger for a pointer

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, with the names that the format had before;
# https://git-annex.branchable.com/internals/pointer_file/
_POINTERS = (
    (
        re.compile(
            rb"version https?://(?:git-lfs\.github\.com/spec|hawser\.github\.com/spec|git-media\.io)/\S+\r?\n"
            rb"(?:[a-z0-9.-]+ \S.*\r?\n)*oid \S+\r?\n(?:[a-z0-9.-]+ \S.*(?:\r?\n|$))*"
        ),
        "Git LFS",
        "fetch the file itself with `git lfs pull`",
    ),
    (re.compile(rb"# xet version \S+"), "Git Xet", "fetch the file itself with `git xet checkout`"),
    (re.compile(rb"/annex/objects/\S+\s"), "git-annex", "fetch the file itself with `git annex get`"),
)
_ANNEX_TARGET = re.compile(r"(^|/)annex/objects/")

DVC_SUFFIX = ".dvc"  # NAME.dvc stands beside NAME, or for it

_FORMATS = (
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PAR1", "a Parquet file"),
    (b"PARE", "an encrypted Parquet file"),
    (b"ARROW1", "an Arrow file (IPC file format, Feather version 2)"),
    (b"FEA1", "a Feather file of version 1"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF"),
    (b"\xd0\xcf\x11\xe0", "a file of an old Office program"),
    (b"Salted__", "data that OpenSSL encrypted"),
    (b"age-encryption.org/", "data that age encrypted"),
    (b"\0\x05\x16\x07", "the resource fork of a file of macOS"),
    (b"<!DOCTYPE html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML page"),
)
_PLAIN_TEXT = "plain text"
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def pointer(head: bytes) -> tuple[str, str] | None:
    """What a file is a pointer of, and how to fetch what it points to; None for a file that is no pointer.

    Args:
      head: the file's first bytes, `HEAD_BYTES` or all of them.
    """
    if len(head) >= HEAD_BYTES:
        return None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()  # which editors and shells put there
    return next(((tool, advice) for pattern, tool, advice in _POINTERS if pattern.match(start)), None)


def check_no_pointer(path: Path, content: bytes) -> None:
    """Raise UserError if a file with this content is a pointer.

    Args:
      path: of the file, for the sentence.
      content: all of it, or its first `HEAD_BYTES`.
    """
    if (found := pointer(content[:HEAD_BYTES])) is not None:
        tool, advice = found
        raise UserError(f"{path} is a pointer of {tool} to a file that is kept elsewhere; {advice}.")


def check_file_no_pointer(path: Path) -> None:
    """The same for a file that could not be read as what it should be; one that cannot be opened is no pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return
    check_no_pointer(path, head)


def check_folder_no_pointers(folder: Path) -> None:
    """The same for all files below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            check_file_no_pointer(path)


def link_pointer(target: str) -> tuple[str, str] | None:
    """The same for a link that leads nowhere, by where it leads."""
    if _ANNEX_TARGET.search(target):
        return "git-annex", "fetch the file itself with `git annex get`"
    return None


def format_of(head: bytes) -> str | None:
    """What a file with these first bytes is, for a sentence; None: nothing that is known here."""
    return next((name for mark, name in _FORMATS if head[: len(mark)].lower() == mark.lower()), None)


def format_or_text(head: bytes) -> str | None:
    """The same, where text is something else than what the file's name says."""
    if (known := format_of(head)) is not None:
        return known
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    return None if not text or _CONTROLS.search(text) else _PLAIN_TEXT


def advice_on(known: str, otherwise: str) -> str:
    """What to do about a file that is not of the format that its name says.

    Args:
      known: what it is.
      otherwise: the advice where it is no page.
    """
    is_page = known.endswith(" page")
    return "if it is what a server answered in place of the file, fetch the file again" if is_page else otherwise
