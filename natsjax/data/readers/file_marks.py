"""Recognition of files by their first bytes: pointers to files that are stored elsewhere, and formats."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from natsjax.errors import UserError

HEAD_BYTES = 1024  # a pointer of Git LFS is never larger

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

DVC_SUFFIX = ".dvc"  # NAME.dvc is stored beside NAME, or instead of it

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
    """Recognizes a pointer to a file that is stored elsewhere, by its first bytes (``HEAD_BYTES``, or all).

    Returns:
      ``(tool, advice)``; None for a file that is no pointer.
    """
    if len(head) >= HEAD_BYTES:
        return None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()  # which editors and shells may have added
    return next(((tool, advice) for pattern, tool, advice in _POINTERS if pattern.match(start)), None)


def check_no_pointer(path: Path, content: bytes) -> None:
    """Raises UserError if a file with this content (all, or the first ``HEAD_BYTES``) is a pointer."""
    if (found := pointer(content[:HEAD_BYTES])) is not None:
        tool, advice = found
        raise UserError(f"{path} is a pointer of {tool} to a file that is kept elsewhere; {advice}.")


def check_file_no_pointer(path: Path) -> None:
    """Raises UserError if a file is a pointer; a file that cannot be opened is none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return
    check_no_pointer(path, head)


def check_folder_no_pointers(folder: Path) -> None:
    """Raises UserError if any file below a folder is a pointer."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            check_file_no_pointer(path)


def link_pointer(target: str) -> tuple[str, str] | None:
    """Recognizes a broken link that is a pointer, by its target; returns ``(tool, advice)`` or None."""
    if _ANNEX_TARGET.search(target):
        return "git-annex", "fetch the file itself with `git annex get`"
    return None


def format_of(head: bytes) -> str | None:
    """Names the format of a file with these first bytes, for a message; None: unknown."""
    return next((name for mark, name in _FORMATS if head[: len(mark)].lower() == mark.lower()), None)


def format_or_text(head: bytes) -> str | None:
    """Names the format, with plain text as one, for a file whose suffix is not a text format's."""
    if (known := format_of(head)) is not None:
        return known
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    return None if not text or _CONTROLS.search(text) else _PLAIN_TEXT


def advice_on(known: str, otherwise: str) -> str:
    """Returns advice on a file in a ``known`` format that is not that of its suffix; ``otherwise`` if it is no page."""
    is_page = known.endswith(" page")
    return "if a server sent it instead of the file, fetch the file again" if is_page else otherwise
