"""Files of JSON records: lines (``.jsonl``, ``.ndjson``), and ``.json``, with lines, an array, or one object."""

from __future__ import annotations

import codecs
import json
import re
import textwrap
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from natsjax.data.readers.file_marks import HEAD_BYTES, advice_on, format_of
from natsjax.data.readers.sources import UNREADABLE, BadFileError, Document, NoTextError, bad_file, reason
from natsjax.data.readers.text_files import CompressibleFile, with_compressions

JSON_LINES_SUFFIXES = with_compressions(".jsonl", ".ndjson")
JSON_SUFFIXES = with_compressions(".json")

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# Python's int takes 4,300 digits, JSON any number of them.
_LONG_NUMBERS_DECODER = json.JSONDecoder(parse_int=Decimal)
_EDGE = 16  # characters; a value that continues after the end of what was read fails within these


class _JsonRecords(CompressibleFile):
    """A file of JSON objects, each a document; ``optional`` if it may have other content than texts."""

    _any_layout = False  # True if records need not be one per line

    def __init__(self, path: Path, name: str, text_field: str, *, optional: bool = False):
        super().__init__(path, name)
        self._text_field = text_field
        self.optional = optional

    @abstractmethod
    def _records(self) -> Iterator[tuple[int, Any]]:
        """Yields the number (of the line, or of the value) and the value of each record."""

    def documents(self) -> Iterator[Document]:
        """Yields a document for each record; an empty one if the text is null, or missing unlike in other records."""
        without = array("Q")
        found, has_field = "", False
        for number, record in self._records():
            where = f"{self.path}:{number}"
            if not isinstance(record, dict):
                hint = "" if self._any_layout else "; a file that is one array must be called .json"
                raise NoTextError(
                    f"{where} holds a JSON {type(record).__name__}; every record must be a JSON object{hint}."
                )
            if self._text_field not in record:
                found = found or _fields_of(record)
                without.append(number)
                continue
            has_field = True
            yield self._document(record, where, number)
        if without and not has_field:
            raise NoTextError(
                f"{self.path}:{without[0]} has no field {self._text_field!r} (fields found: {found or 'none'}), nor "
                "has any other record of the file; name the field of the text with text_field."
            )
        for number in without:
            yield Document(f"{self.name}:{number}", "")

    def _document(self, record: dict[str, Any], where: str, number: int) -> Document:
        text = record[self._text_field]
        if not (text is None or isinstance(text, str)):
            raise NoTextError(
                f"{where} has no text in field {self._text_field!r} but a JSON {type(text).__name__} (fields found: "
                f"{_fields_of(record)}); name the field of the text with text_field."
            )
        identity = record.get("id")
        has_id = isinstance(identity, (str, int, Decimal)) and not isinstance(identity, bool)
        document = Document(str(identity) if has_id else f"{self.name}:{number}", text or "")
        try:  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
            (document.id + document.text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._bad_record(number, "holds a lone surrogate escape, which is no valid Unicode") from error
        return document

    def _bad_record(self, number: int, what: str, **options: str) -> BadFileError:
        return bad_file(Path(f"{self.path}:{number}"), what, **options)

    def _parsed(self, text: str, start: int, number: int) -> tuple[Any, int]:
        """Parses the value at ``start`` and returns it and its end; raises JSONDecodeError where there is none."""
        try:
            try:
                return _DECODER.raw_decode(text, start)
            except json.JSONDecodeError:
                raise
            except ValueError:
                return _LONG_NUMBERS_DECODER.raw_decode(text, start)
        except RecursionError as error:
            what, advice = "nests JSON deeper than Python reads it", "flatten that record, or remove its other fields"
            raise self._bad_record(number, what, kind=UNREADABLE, advice=advice) from error

    def _no_json(self, number: int, what: str, text: str, *, is_first: bool) -> BadFileError:
        """Builds the error for a record that does not parse; if it is the first, the file may have another format."""
        what = f"is no valid JSON: {what}"
        known = format_of(text[:HEAD_BYTES].encode("utf-8", "replace")) if is_first else None
        if known is not None:
            advice = advice_on(known, "convert it")
            return self._bad_record(number, f"{what} (it begins like {known})", kind=UNREADABLE, advice=advice)
        if is_first and text[0] in "[{" and not self._any_layout:
            advice = "correct the file, or name it .json if that is an array, or an object over several lines"
            return self._bad_record(number, what, advice=advice)
        return self._bad_record(number, what)

    def _lines(self) -> Iterator[str]:
        offset = 0
        for line in _split_lines(self.chunks()):
            yield self.decode(line, offset)
            offset += len(line)


class JsonLines(_JsonRecords):
    """A file with a JSON object in each line."""

    def _records(self) -> Iterator[tuple[int, Any]]:
        is_first = True
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            stripped = line.strip(" \t\n\r")
            try:
                value, end = self._parsed(stripped, 0, number)
                if end != len(stripped):
                    raise json.JSONDecodeError("Extra data", stripped, end)
            except json.JSONDecodeError as error:
                raise self._no_json(number, str(error), stripped, is_first=is_first) from error
            yield number, value
            is_first = False


class JsonFile(JsonLines):
    """A file of JSON in any layout: lines as in ``JsonLines``, an array of objects, or one object."""

    _any_layout = True

    def _records(self) -> Iterator[tuple[int, Any]]:
        if self._has_lines():
            return super()._records()
        return self._values()

    def _has_lines(self) -> bool:
        """Returns True if the first line that is not blank is a whole object."""
        if _Growing(self._pieces()).next() != "{":  # else an array, which may be one line of any length
            return False
        for line in self._lines():
            if stripped := line.strip(" \t\n\r"):
                try:
                    value, end = self._parsed(stripped, 0, 1)
                except json.JSONDecodeError:
                    return False
                return isinstance(value, dict) and end == len(stripped)
        return False

    def _values(self) -> Iterator[tuple[int, Any]]:
        """Yields the items of an array one at a time, or the values of the file one after the other."""
        text = _Growing(self._pieces())
        number = 0
        is_array = text.next() == "["
        if is_array:
            text.at += 1
        while (character := text.next()) and not (is_array and character == "]"):
            number += 1
            yield number, self._value(text, number)
            if is_array and (character := text.next()) == ",":
                text.at += 1
                if text.next() == "]":
                    raise self._bad_record(number, "is no valid JSON: a comma with nothing after it")
            elif is_array and character != "]":
                raise self._bad_record(number, "is no valid JSON: neither a comma nor a bracket after it")
        if is_array:
            if not character:
                raise self.bad("is no valid JSON: its array does not end")
            text.at += 1
            if text.next():
                raise self.bad("is no valid JSON: there is more after its array")

    def _value(self, text: _Growing, number: int) -> Any:
        while True:
            try:
                value, end = self._parsed(text.read, text.at, number)
            except json.JSONDecodeError as error:
                may_continue = error.msg.startswith("Unterminated") or error.pos >= len(text.read) - _EDGE
                if may_continue and text.grow():
                    continue
                start = text.read[text.at : text.at + HEAD_BYTES]
                raise self._no_json(number, error.msg, start, is_first=number == 1) from error
            # A number that ends where the text does may have more digits.
            if end < len(text.read) or not text.grow():
                text.at = end
                return value

    def _pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        offset = 0
        for chunk in self.chunks():
            waiting = len(decoder.getstate()[0])
            try:
                yield decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise self.not_utf8(error.object[error.start], offset - waiting + error.start) from error
            offset += len(chunk)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self.bad(f"is no whole UTF-8 ({reason(error)})") from error


class _Growing:
    """Text that is read on demand.

    Attributes:
      read: the part in memory.
      at: place in ``read``; the text before it is dropped.
    """

    def __init__(self, pieces: Iterator[str]):
        self._pieces = pieces
        self.read = ""
        self.at = 0

    def next(self) -> str:
        """Moves to the next character that is not white space, and returns it; empty at the end."""
        while True:
            match = _WHITE_SPACE.match(self.read, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.read):
                return self.read[self.at]
            if not self.grow():
                return ""

    def grow(self) -> bool:
        """Doubles the text in memory, so that a long value is parsed only a few times; returns False at the end."""
        parts = [self.read[self.at :]]
        held, new = len(parts[0]), 0
        for piece in self._pieces:
            parts.append(piece)
            new += len(piece)
            if new > held:
                break
        self.read, self.at = "".join(parts), 0
        return new > 0


def _fields_of(record: dict[str, Any]) -> str:
    return textwrap.shorten(", ".join(sorted(record)), 120, placeholder=" …")


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
