"""The base class of tokenizers, in which every token stands for a string of bytes, and what displays need of one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.errors import UserError

FORMAT_VERSION = 1
_IDS_AT_A_TIME = 1 << 18
DESCRIPTION_FILE = "natsjax_tokenizer.json"

Int32Array = npt.NDArray[np.int32]


@runtime_checkable
class Vocabulary(Protocol):
    """Token ids as displays and metrics need them, also of synthetic tasks without text."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, specials included."""
        ...

    @property
    def token_bytes(self) -> Int32Array | None:
        """Bytes of decoded text that each id stands for, int32 ``[vocab_size]``, 0 for specials; None without text.

        Bits per byte = nats / ln 2 / bytes. (Not every tokenizer of another project is lossless: see ``pretrained``.)
        """
        ...

    def token_text(self, token_id: int) -> str:
        """Returns one token as text for display."""
        ...


class Tokenizer(ABC):
    """A mapping from text to token ids and back; the text of several tokens is the concatenation of their bytes.

    Decoding is therefore the same for a whole text and for its parts: ``decode(a + b) == decode(a) + decode(b)`` if no
    character is split. That holds also for tokenizers that put a space before every text: the decoded text has the
    space, except directly after BOS, at the beginning of a document.

    Args:
      pieces: bytes of each id, in id order, with empty ones for specials.
      bos_id: id of BOS, with an empty piece.
      eos_id: id of EOS, with an empty piece. It may be ``bos_id``, as in GPT-2.
      names: texts for display of ids without text (other specials, unknown text).
      adds_space: True if ``encode`` puts a space before every text.

    Attributes:
      kind: ``"byte"``, ``"bpe"``, ``"huggingface"``, ``"sentencepiece"`` or ``"tiktoken"``.
      bos_id: id at the beginning of every document; no text is encoded to it.
      eos_id: id at the end of every document; no text is encoded to it.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        bos_id: int,
        eos_id: int,
        names: Mapping[int, str] | None = None,
        adds_space: bool = False,
    ):
        self._pieces = tuple(pieces)
        self.bos_id, self.eos_id = bos_id, eos_id
        specials = {bos_id: "⟨bos⟩", eos_id: "⟨eos⟩"} if bos_id != eos_id else {bos_id: "⟨bos/eos⟩"}
        self._names = dict(names or {}) | specials
        self._adds_space = adds_space

    @property
    def vocab_size(self) -> int:
        """Number of token ids, BOS and EOS included."""
        return len(self._pieces)

    @functools.cached_property
    def token_bytes(self) -> Int32Array:
        """Number of UTF-8 bytes that each id stands for, int32 ``[vocab_size]``, 0 for specials."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition; with equal fingerprints every text has the same ids."""
        # The definition is hashed, not a file: a new version of a library may write the file differently.
        return hashlib.sha256(json.dumps([self.kind, *self._definition()]).encode()).hexdigest()

    def token_text(self, token_id: int) -> str:
        """Returns one token for display: its text, ⟨bos⟩, ⟨eos⟩, or incomplete UTF-8 in hex (``⟨e2 80⟩``).

        Raises:
          IndexError: the id is outside ``0 … vocab_size-1``.
        """
        piece = self.piece(token_id)
        if token_id in self._names:
            return self._names[token_id]
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return f"⟨{piece.hex(' ')}⟩"

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes token ids to text; specials are skipped, incomplete UTF-8 becomes U+FFFD.

        Raises:
          IndexError: an id is outside ``0 … vocab_size-1``.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decodes token ids to UTF-8, which may begin or end within a character; otherwise as ``decode``."""
        pieces: list[bytes] = []
        is_start = False
        for token_id in map(int, ids):
            piece = self.piece(token_id)
            pieces.append(piece.removeprefix(b" ") if is_start else piece)
            is_start = token_id == self.bos_id and self._adds_space
        return b"".join(pieces)

    def encode(self, text: str) -> Int32Array:
        """Encodes a text as token ids, int32 ``[num_tokens]``, without BOS and EOS.

        Raises:
          UserError: the text is not valid Unicode (it has a lone surrogate), or has a part that the library cannot
            encode.
        """
        _check_unicode(text)
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Encodes several texts as ``encode`` does, on all cores if the library can."""
        for text in texts:
            _check_unicode(text)
        return self._encode_batch(texts)

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> Tokenizer:
        """Loads what ``save`` wrote; ``description`` is the content of the description file. Damage is a UserError."""

    @abstractmethod
    def _encode(self, text: str) -> Int32Array:
        """Encodes a text that is valid Unicode."""

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        return [self._encode(text) for text in texts]

    @abstractmethod
    def _definition(self) -> list[object]:
        """Returns everything that determines the encoding, as plain JSON."""

    def _options(self) -> dict[str, Any]:
        """Returns what loading needs in the description, besides the files of ``_write``."""
        return {}

    def _write(self, folder: Path) -> None:
        """Writes the files of this kind of tokenizer; there may be none."""
        return None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer to a folder (created if it is missing) that ``load_tokenizer`` reads.

        For BPE and the formats of other projects, the folder has the tokenizer in that format as well.

        Raises:
          OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            **self._options(),
        }
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        self._write(folder)

    def piece(self, token_id: int) -> bytes:
        """Returns the bytes that one id stands for, none for specials.

        Raises:
          IndexError: the id is outside ``0 … vocab_size-1``.
        """
        # A negative id must not wrap around to another token.
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside 0 … {self.vocab_size - 1}")
        return self._pieces[token_id]


def as_ids(ids: Sequence[int]) -> Int32Array:
    """Converts token ids to int32 ``[num_tokens]``, in parts, between which other threads can run."""
    found = np.empty(len(ids), np.int32)
    for begin in range(0, len(ids), _IDS_AT_A_TIME):
        found[begin : begin + _IDS_AT_A_TIME] = ids[begin : begin + _IDS_AT_A_TIME]
    return found


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: it has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError if the file cannot be read, is a pointer, or holds something else."""
    try:
        data = path.read_bytes()
        check_no_pointer(path, data)
        content = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; an object was expected.")
    return content
