"""Text files and JSON lines, compressed or not."""

from __future__ import annotations

import gzip
import json
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from natsjax.data.sources import Document, FileSource, reason
from natsjax.errors import UserError

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"


class _CompressibleFile(FileSource):
    """A file of UTF-8 text whose suffix says how it is compressed."""

    def _chunks(self) -> Iterator[bytes]:
        """The uncompressed bytes, in pieces of any size."""
        suffix = self.path.suffix.lower()
        try:
            with self.path.open("rb") as file:
                if suffix == ".zst":
                    yield from _zstd_chunks(file)
                elif suffix == ".gz":
                    with gzip.GzipFile(fileobj=file) as plain:
                        yield from _plain_chunks(plain)
                else:
                    yield from _plain_chunks(file)
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self.bad(f"is no whole gzip file ({reason(error)})") from error
        except (zstandard.ZstdError, EOFError) as error:
            kind = "gzip" if suffix == ".gz" else "zstd"
            raise self.bad(f"is no whole {kind} file ({reason(error)})") from error
        except OSError as error:
            raise self.bad(f"cannot be read: {error.strerror}") from error

    def _decode(self, data: bytes, offset: int) -> str:
        """UTF-8 to text; `offset` is where `data` begins in the uncompressed file."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            value = data[error.start]
            raise self.bad(f"is not UTF-8: byte 0x{value:02x} at offset {offset + error.start}") from error
        return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text


class TextFile(_CompressibleFile):
    """A file that is one document."""

    def documents(self) -> Iterator[Document]:
        """The one document."""
        yield Document(self.name, self._decode(b"".join(self._chunks()), 0))

    def check(self) -> None:
        """Reads the file."""
        for _ in self.documents():
            pass


class JsonLines(_CompressibleFile):
    """A file with a JSON object in each line.

    Args:
      path: where it is.
      name: its path below the input.
      text_field: field of each object that holds the text.
    """

    def __init__(self, path: Path, name: str, text_field: str):
        super().__init__(path, name)
        self._text_field = text_field

    def documents(self) -> Iterator[Document]:
        """A document a line; blank lines are none."""
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield self._document(line, number)

    def check(self) -> None:
        """Reads the lines, not what they mean."""
        for _ in self._lines():
            pass

    def _lines(self) -> Iterator[str]:
        offset = 0
        for line in _split_lines(self._chunks()):
            yield self._decode(line, offset)
            offset += len(line)

    def _document(self, line: str, number: int) -> Document:
        where = f"{self.path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} holds a JSON {type(record).__name__}; every line must be one JSON object.")
        text = record.get(self._text_field)
        if not isinstance(text, str):
            found = textwrap.shorten(", ".join(sorted(record)), 120, placeholder=" …") or "none"
            problem = "no field" if self._text_field not in record else "no text in field"
            raise UserError(
                f"{where} has {problem} {self._text_field!r} (fields found: {found}); name the field that "
                "holds the text with text_field."
            )
        identity = record.get("id")
        has_id = isinstance(identity, (str, int)) and not isinstance(identity, bool)
        document = Document(str(identity) if has_id else f"{self.name}:{number}", text)
        try:  # JSON can escape half a surrogate pair, which no UTF-8 can hold
            (document.id + document.text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds a lone surrogate escape, which is no valid Unicode.") from error
        return document


def _plain_chunks(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    # Frame by frame, because the library's stream reader takes a file that ends in mid-frame for a whole one.
    frame = None
    for chunk in _plain_chunks(file):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends too early")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that is not whole yet; joined once, or a long line would be copied per chunk
    for chunk in chunks:
        first, *lines = chunk.split(b"\n")
        parts.append(first)
        for line in lines:
            yield b"".join(parts) + b"\n"
            parts = [line]
    if rest := b"".join(parts):
        yield rest
