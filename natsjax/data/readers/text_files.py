"""Files of text, perhaps compressed; and text files, which are one document each."""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import zstandard

from natsjax.data.readers.file_marks import HEAD_BYTES, advice_on, format_of, format_or_text
from natsjax.data.readers.sources import Document, FileSource, cannot_read, first_bytes, reason, refuse_pointer

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"
# UTF-32 first, for one of its marks begins like one of UTF-16.
_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

# The largest of the format, `zstd --long=31`. The library's default is 128 MiB.
_LARGEST_ZSTD_WINDOW = 1 << 31

# By suffix: name of the format, and a decompressor of one member of a file (`.eof`, `.unused_data`).
_COMPRESSIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    ".gz": ("gzip", lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)),
    ".zst": ("zstd", lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW).decompressobj()),
    ".bz2": ("bzip2", bz2.BZ2Decompressor),
    ".xz": ("xz", lzma.LZMADecompressor),  # also of the older format .lzma
}


def with_compressions(*suffixes: str) -> tuple[str, ...]:
    """Returns each suffix, plain and with that of each compression."""
    return tuple(suffix + packed for suffix in suffixes for packed in ("", *_COMPRESSIONS))


COMPRESSION_SUFFIXES = tuple(_COMPRESSIONS)
TEXT_SUFFIXES = with_compressions(".txt")


class CompressibleFile(FileSource):
    """A file of Unicode text, compressed according to its suffix."""

    def chunks(self) -> Iterator[bytes]:
        """Yields the uncompressed text in UTF-8, in pieces of any size.

        Raises:
          BadFileError: the file cannot be opened or decompressed, is a pointer, or begins with the byte-order mark of
            UTF-16 or UTF-32 and is not that.
        """
        try:
            with self.path.open("rb") as file:
                refuse_pointer(self.path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
                packed = self.path.suffix.lower()
                yield from self._as_utf8(self._members(file, packed) if packed in _COMPRESSIONS else _pieces(file))
        except OSError as error:
            raise cannot_read(self.path, error) from error

    def decode(self, data: bytes, offset: int) -> str:
        """Decodes UTF-8; ``offset`` is the place of ``data`` in the uncompressed file."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.not_utf8(data[error.start], offset + error.start) from error
        return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text

    def not_utf8(self, value: int, offset: int) -> Exception:
        """Builds the error for a byte that is not UTF-8, at ``offset`` in the uncompressed file."""
        known = None if self.path.suffix.lower() in _COMPRESSIONS else format_of(first_bytes(self.path))
        note = f" (it begins like {known})" if known else ""
        what = f"is not UTF-8: byte 0x{value:02x} at offset {offset}{note}"
        if known is None:
            return self.bad(what, advice="convert it, as `iconv -f WINDOWS-1252 -t UTF-8` does")
        return self.unreadable(what, "unpack or convert it")

    def _members(self, file: BinaryIO, suffix: str) -> Iterator[bytes]:
        # Member by member: the libraries' readers accept a file that ends inside a frame (zstd), or skip everything
        # after padding or a damaged header (bz2, lzma).
        name, new = _COMPRESSIONS[suffix]
        member, is_first, is_begun = None, True, False
        for piece in _pieces(file):
            chunk = piece
            while True:
                if member is None:
                    chunk = chunk if is_first else chunk.lstrip(b"\0")  # tar and xz pad with zeros
                    if not chunk:
                        break
                    member, is_first = new(), False
                try:
                    data = member.decompress(chunk)
                except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, MemoryError) as error:
                    raise self._cannot_decompress(name, error, is_begun=is_begun) from error
                is_begun = True
                yield data
                if not member.eof:
                    break
                chunk, member = member.unused_data, None
        if member is not None:
            raise self.bad(f"is no whole {name} file (it ends too early)")

    def _cannot_decompress(self, name: str, error: Exception, *, is_begun: bool) -> Exception:
        if isinstance(error, zstandard.ZstdError) and "ictionary" in str(error):
            what = "was compressed with a dictionary, which is stored elsewhere"
            return self.unreadable(what, "decompress it with `zstd -d -D DICTIONARY`")
        if isinstance(error, MemoryError) or "memory" in str(error):
            what = f"needs more memory to decompress than there is ({reason(error)})"
            return self.unreadable(what, f"compress it again with a smaller window or dictionary of {name}")
        what = f"is no whole {name} file ({reason(error)})"
        known = None if is_begun else format_or_text(first_bytes(self.path))
        if known is None or known.startswith(name):
            return self.bad(what)
        advice = advice_on(known, f"name it by its format, without {self.path.suffix}")
        return self.unreadable(what, f"it begins like {known}: {advice}")

    def _as_utf8(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= 64:
                break
        rest = chain([head], chunks)
        codec = next((name for mark, name in _WIDE_MARKS if head.startswith(mark)), None)
        if codec is None:
            if _is_half_zeros(head[:64]):
                advice = "convert it with `iconv -f UTF-16LE -t UTF-8` (or UTF-16BE)"
                raise self.unreadable("looks like UTF-16 without a byte-order mark", advice)
            yield from rest
            return
        decoder = codecs.getincrementaldecoder(codec)()
        try:
            for chunk in rest:
                yield decoder.decode(chunk).encode("utf-8")
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            what = f"begins with the byte-order mark of {codec} but is not {codec} ({reason(error)})"
            raise self.bad(what) from error


class TextFile(CompressibleFile):
    """A file that is one document."""

    def documents(self) -> Iterator[Document]:
        """Yields the document."""
        yield Document(self.name, self.decode(b"".join(self.chunks()), 0))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_CHUNK_BYTES):
        yield piece


def _is_half_zeros(head: bytes) -> bool:
    """Returns True if every other byte is zero, as in UTF-16 of Latin letters."""
    if len(head) < 16:
        return False
    return any(not any(head[start::2]) and all(head[1 - start :: 2]) for start in (0, 1))
