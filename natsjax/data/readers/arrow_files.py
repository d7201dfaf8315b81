"""Parquet files, and Hugging Face datasets as ``datasets.save_to_disk`` writes them; read with pyarrow alone.

A saved dataset is a folder with ``dataset_info.json``, ``state.json`` (which names the shards) and the shards, files in
Arrow's IPC stream format. Several splits are such folders, side by side, under one with ``dataset_dict.json``.
https://huggingface.co/docs/datasets/process#save, https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import inspect
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsjax.data.optional import import_optional
from natsjax.data.readers.file_marks import HEAD_BYTES, advice_on, format_or_text
from natsjax.data.readers.sources import (
    BadFileError,
    Document,
    FileSource,
    bad_file,
    cannot_read,
    first_bytes,
    reason,
    refuse_pointer,
)
from natsjax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

PARQUET_SUFFIX = ".parquet"
DEFAULT_SPLIT = "train"

_STATE_FILE = "state.json"
_INFO_FILE = "dataset_info.json"
_SPLITS_FILE = "dataset_dict.json"

_BATCH_ROWS = 64  # documents in memory at a time; each may be a book
_READ_BUFFER_BYTES = 1 << 20
_LARGEST_LIMIT = (1 << 31) - 1  # of a signed 32-bit integer
# Messages of pyarrow, in several exceptions, for a file that may be sound.
_NOT_SUPPORTED = re.compile(r"(?i)not (currently )?supported|unsupported|not (yet )?implemented|not built|exceed")
_FILE_MARK = b"ARROW1"  # of the format with a footer, which some programs write
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class _Table(FileSource):
    """A file of columns, one with text and perhaps one with ids."""

    format: str  # for messages

    def __init__(self, path: Path, name: str, text_field: str):
        super().__init__(path, name)
        self._text_field = text_field

    def documents(self) -> Iterator[Document]:
        """Yields a document for each row; a null is an empty one."""
        arrow = import_optional("pyarrow.parquet", str(self.path))
        row = 0
        try:
            for texts, ids in self._columns(arrow):
                values = texts.to_pylist()
                names = [None] * len(values) if ids is None else ids.to_pylist()
                for name, value in zip(names, values, strict=True):
                    row += 1
                    text = value.decode("utf-8") if isinstance(value, bytes) else value or ""
                    yield Document(f"{self.name}:{row}" if name is None else str(name), text)
        except UnicodeDecodeError as error:
            raise self.bad(f"is not UTF-8 in row {row}") from error
        except (arrow.ArrowException, OSError, MemoryError) as error:
            raise self._cannot_read(arrow, error) from error

    def _cannot_read(self, arrow: Any, error: BaseException) -> BadFileError:
        """Converts an error of the library or the system."""
        if isinstance(error, OSError) and error.strerror:
            return cannot_read(self.path, error)
        head = first_bytes(self.path)
        refuse_pointer(self.path, head)
        known = format_or_text(head)
        message = reason(error)
        if "crypt" in f"{known}{message}":
            return self.unreadable(f"is an encrypted {self.format} ({message})", "write it without encryption")
        if known is not None and not known.endswith(self.format):
            return self.unreadable(f"is {known}, no {self.format}", advice_on(known, "write it in that format"))
        if isinstance(error, NotImplementedError) or _NOT_SUPPORTED.search(message):
            what = f"is a {self.format} that pyarrow {arrow.__version__} cannot read ({message})"
            return self.unreadable(what, "write it again with another compression or encoding")
        if isinstance(error, MemoryError):  # also for a damaged length
            what = f"needs more memory than there is, or is damaged ({message})"
            return self.unreadable(what, "write it again with smaller row groups")
        return self.bad(f"is no whole {self.format} ({message})")

    @abstractmethod
    def _columns(self, arrow: Any) -> Iterator[tuple[pyarrow.Array, pyarrow.Array | None]]:
        """Yields batches of texts and ids, validated so that reading them stays inside the buffers."""

    def _wanted(self, arrow: Any, schema: pyarrow.Schema) -> tuple[int, int | None]:
        """Returns the indices of the columns of text and of ids."""
        names = schema.names
        advice = "name the column of the text with text_field."
        if self._text_field not in names:
            found = ", ".join(sorted(names)) or "none"
            raise UserError(f"{self.path} has no column {self._text_field!r} (columns found: {found}); {advice}")
        text = names.index(self._text_field)
        kind = schema.field(text).type
        if not (_is_text(arrow, kind) or arrow.types.is_null(kind)):
            found = ", ".join(field.name for field in schema if _is_text(arrow, field.type)) or "none"
            raise UserError(
                f"{self.path} has no text in column {self._text_field!r}, whose type is {kind} (columns of text: "
                f"{found}); {advice}"
            )
        identity = names.index("id") if "id" in names and self._text_field != "id" else None
        if identity is not None:
            kind = schema.field(identity).type
            if not (arrow.types.is_integer(kind) or (_is_text(arrow, kind) and not _is_binary(arrow, kind))):
                identity = None
        return text, identity


class ParquetFile(_Table):
    """A Parquet file, read a few rows at a time."""

    format = "Parquet file"

    def _columns(self, arrow: Any) -> Iterator[tuple[pyarrow.Array, pyarrow.Array | None]]:
        # Opened here, because pyarrow takes no path that is not UTF-8.
        with (
            self.path.open("rb") as opened,
            arrow.parquet.ParquetFile(
                opened, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, **_limits(arrow.parquet.ParquetFile)
            ) as file,
        ):
            text, identity = self._wanted(arrow, file.schema_arrow)
            names = [file.schema_arrow.names[column] for column in (text, identity) if column is not None]
            for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                texts = batch.column(batch.schema.names.index(names[0]))
                ids = None if identity is None else batch.column(batch.schema.names.index("id"))
                for column in (texts, ids):
                    if column is not None:
                        column.validate(full=True)
                yield texts, ids


class ArrowShard(_Table):
    """A shard of a saved dataset, read record batch by record batch."""

    format = "Arrow stream"

    def _columns(self, arrow: Any) -> Iterator[tuple[pyarrow.Array, pyarrow.Array | None]]:
        with self.path.open("rb") as file:
            is_stream = not file.peek(len(_FILE_MARK)).startswith(_FILE_MARK)
            with (arrow.ipc.open_stream if is_stream else arrow.ipc.open_file)(file) as opened:
                text, identity = self._wanted(arrow, opened.schema)
                for batch in opened if is_stream else map(opened.get_batch, range(opened.num_record_batches)):
                    batch.validate(full=True)  # the format has no checksums: offsets could point anywhere
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        part = batch.slice(start, _BATCH_ROWS)
                        yield part.column(text), None if identity is None else part.column(identity)
            if not is_stream:
                return
            # The library accepts a file that was cut off between two batches.
            file.seek(max(0, self.path.stat().st_size - len(_END_OF_STREAM)))
            if file.read() != _END_OF_STREAM:
                raise self.bad("is no whole Arrow stream (it ends too early)")


def _limits(opener: Any) -> dict[str, int]:
    """Returns arguments that lift pyarrow's limits: footers of 100 MB, a million columns and groups."""
    names = ("thrift_string_size_limit", "thrift_container_size_limit", "schema_depth_limit")
    known = inspect.signature(opener).parameters  # not every version has the last one
    return {name: _LARGEST_LIMIT for name in names if name in known}


def is_dataset(folder: Path) -> bool:
    """Returns True for a folder that ``save_to_disk`` of one dataset wrote."""
    return (folder / _STATE_FILE).is_file() and (folder / _INFO_FILE).is_file()


def is_dataset_dict(folder: Path) -> bool:
    """Returns True for a folder that ``save_to_disk`` of several splits wrote."""
    return (folder / _SPLITS_FILE).is_file()


def other_splits(folder: Path, split: str) -> list[str]:
    """Returns the names of the other splits; raises UserError if there is no such split, BadFileError for damage."""
    splits = _read_json(folder / _SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise bad_file(folder / _SPLITS_FILE, "holds no list of splits")
    if split not in splits:
        raise UserError(
            f"the dataset {folder} has no split {split!r} (splits found: {', '.join(splits) or 'none'}); name one "
            f"after the folder, as in {folder}:{splits[0] if splits else DEFAULT_SPLIT}."
        )
    return [name for name in splits if name != split]


def dataset_sources(folder: Path, name: str, text_field: str) -> list[ArrowShard]:
    """Returns the shards of a saved dataset, in its order; ``name`` is its path below the input.

    Raises:
      BadFileError: its ``state.json`` is missing or damaged.
      UserError: it has an indices mapping.
    """
    state_file = folder / _STATE_FILE
    state = _read_json(state_file)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{state_file} names an indices mapping (_indices_data_files), as `datasets` wrote before version 2; "
            "load the dataset with that library and save it again, which sorts the rows."
        )
    files = state.get("_data_files")
    try:
        shards = [str(file["filename"]) for file in files]  # type: ignore[union-attr]
    except (TypeError, KeyError) as error:
        raise bad_file(state_file, "names no data files") from error
    prefix = f"{name}/" if name else ""
    return [ArrowShard(folder / shard, prefix + shard, text_field) for shard in shards]


def beside_shards(folder: Path, shards: list[ArrowShard]) -> list[str]:
    """Returns the names of files in the folder of a saved dataset that are not part of it."""
    own = {_STATE_FILE, _INFO_FILE, _SPLITS_FILE, *(shard.path.relative_to(folder).parts[0] for shard in shards)}
    return sorted(set(os.listdir(folder)) - own)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        refuse_pointer(path, data[:HEAD_BYTES])
        content = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is no valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise bad_file(path, f"holds a JSON {type(content).__name__} where an object belongs")
    return content


def _is_text(arrow: Any, kind: pyarrow.DataType) -> bool:
    types = arrow.types
    kind = _values_of(arrow, kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or _is_binary(arrow, kind)


def _is_binary(arrow: Any, kind: pyarrow.DataType) -> bool:
    """Returns True for bytes that are not marked as text, as some programs write text; they are read as UTF-8."""
    types = arrow.types
    kind = _values_of(arrow, kind)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _values_of(arrow: Any, kind: pyarrow.DataType) -> pyarrow.DataType:
    """Returns the type of the values that are stored as a dictionary, in runs or as an extension."""
    while True:
        if arrow.types.is_dictionary(kind) or arrow.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, arrow.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind
